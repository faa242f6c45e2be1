# %% [markdown]
# ## The chat page
#
# One file of HTML that the chat server hands out: no framework, no build step, nothing loaded from elsewhere, so it
# works on an aeroplane and in a notebook's frame. It streams, stops, edits, regenerates, and shows each call of the
# calculator at the place where the model made it.
#
# Two things deserve a careful reading. A network hands over bytes in pieces of its own choosing, so an event, and even
# one letter of it, may arrive in two halves. And what a model writes is text, whatever it looks like: it enters the
# page as text nodes, never as markup, and the page's own policy runs no script but the one that is printed here.

# %%
import base64
import hashlib
import json
import uuid

from nanochat.plots import in_notebook, show_html
from nanochat.runtime import print0

# %% [markdown]
# ### The look
# One column, as wide as a comfortable line of text, in the fonts that the reader's own system uses. Colours come in
# two sets, for light rooms and dark ones; the reader's system says which.

# %% tags=["folded"]
CHAT_STYLE = r"""
:root {
  color-scheme: light dark;
  --paper: #fcfbf9; --ink: #22211f; --quiet: #6a675f; --line: #e6e2d9; --bubble: #f0ede6; --raised: #ffffff;
  --accent: #00629a; --on-accent: #ffffff; --tint: #e7f1f8; --alarm: #a8330f; --alarm-tint: #fbeee8; --good: #2e8b57;
  --shadow: 0 1px 2px rgb(60 50 30 / 5%), 0 6px 24px rgb(60 50 30 / 7%);
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #1a1a19; --ink: #eceae5; --quiet: #a5a198; --line: #35342f; --bubble: #2a2926; --raised: #232220;
    --accent: #8cc8ee; --on-accent: #10222e; --tint: #1d3140; --alarm: #f2a385; --alarm-tint: #3a241c; --good: #6cc595;
    --shadow: 0 1px 2px rgb(0 0 0 / 25%), 0 6px 24px rgb(0 0 0 / 25%);
  }
}
*, *::before, *::after { box-sizing: border-box; }
[hidden] { display: none !important; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; height: 100vh; height: 100dvh; display: flex; flex-direction: column; overflow: hidden;
  background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif;
}
button, input, textarea { font: inherit; color: inherit; }
button { cursor: pointer; border: 0; background: none; padding: 0; border-radius: 8px; touch-action: manipulation; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
svg {
  width: 18px; height: 18px; flex: none; fill: none; stroke: currentcolor; stroke-width: 1.75;
  stroke-linecap: round; stroke-linejoin: round;
}
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
code, pre, .call { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }

header {
  display: flex; align-items: center; gap: 4px; border-bottom: 1px solid var(--line);
  padding: 8px max(12px, env(safe-area-inset-right)) 8px max(20px, env(safe-area-inset-left));
  padding-top: max(8px, env(safe-area-inset-top));
}
header div { flex: 1; min-width: 0; display: flex; align-items: baseline; gap: 12px; }
h1 { font-size: 16px; font-weight: 650; margin: 0; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
#state { font-size: 13px; color: var(--quiet); white-space: nowrap; }
#state::before {
  content: ""; display: inline-block; width: 7px; height: 7px; border-radius: 50%; margin-right: 6px;
  background: var(--quiet); vertical-align: 1px;
}
#state.ready::before { background: var(--good); }
#state.away::before { background: var(--alarm); }
header button {
  display: flex; align-items: center; gap: 7px; min-height: 40px; padding: 0 12px; font-size: 14px; color: var(--quiet);
}
header button:disabled { opacity: .5; cursor: default; }
header button:enabled:hover { background: var(--bubble); color: var(--ink); }

main { flex: 1; min-height: 0; overflow-y: auto; overscroll-behavior: contain; }
main:focus-visible { outline-offset: -2px; }
#list, form#composer, #notice { width: 100%; max-width: 760px; margin: 0 auto; padding: 0 20px; }
#list { padding-top: 28px; padding-bottom: 20px; }
article { margin-bottom: 12px; display: flex; flex-direction: column; align-items: flex-start; }
article.user { align-items: flex-end; margin: 16px 0 2px; }
article.user:first-child { margin-top: 0; }
.user .text {
  background: var(--bubble); border-radius: 20px 20px 6px 20px; padding: 9px 16px; max-width: min(85%, 560px);
  white-space: pre-wrap; overflow-wrap: anywhere;
}
.assistant .text { width: 100%; }
.text p { margin: 0; min-height: .75em; white-space: pre-wrap; overflow-wrap: anywhere; }
.text p.item { padding-left: 1.3em; text-indent: -1.3em; }
.text p.title { font-weight: 650; margin-top: .4em; }
.text pre {
  background: var(--bubble); border-radius: 10px; padding: 12px 16px; margin: 10px 0; overflow-x: auto;
  font-size: 14px; line-height: 1.5; text-indent: 0;
}
.text p code { font-size: .9em; background: var(--bubble); border-radius: 5px; padding: 2px 5px; }
.call {
  display: inline-flex; align-items: baseline; gap: 6px; margin: 1px 4px 1px 1px; padding: 0 8px 0 6px;
  font-size: .88em; line-height: 1.7; color: var(--accent); background: var(--tint); border-radius: 7px;
  text-indent: 0; max-width: 100%;
}
.call svg { width: 14px; height: 14px; align-self: center; opacity: .8; }
.call b { font-weight: 650; }
.call.failed { color: var(--quiet); background: none; box-shadow: inset 0 0 0 1px var(--line); }
.writing .text > :last-child::after, .writing .text:empty::after {
  content: ""; display: inline-block; width: 9px; height: 9px; margin-left: 4px; border-radius: 50%;
  background: var(--accent); animation: pulse 1.2s ease-in-out infinite;
}
@keyframes pulse { 50% { opacity: .2; transform: scale(.8); } }
.note { margin: 8px 0 0; font-size: 14px; color: var(--quiet); }
.error {
  margin: 10px 0 0; padding: 10px 10px 10px 14px; border-radius: 10px; font-size: 15px; line-height: 1.45;
  background: var(--alarm-tint); color: var(--alarm); display: flex; align-items: center; gap: 14px;
}
.error button { font-weight: 600; padding: 6px 12px; box-shadow: inset 0 0 0 1px currentcolor; }
.actions { display: flex; gap: 2px; margin: 2px -8px; }
.actions button { font-size: 13px; color: var(--quiet); padding: 3px 8px; min-height: 28px; }
.actions button:hover { color: var(--ink); background: var(--bubble); }
@media (hover: hover) {
  .actions { opacity: 0; transition: opacity .12s; }
  article:hover .actions, article:focus-within .actions, article.assistant:last-child .actions { opacity: 1; }
}
@media (pointer: coarse) { .actions { margin: 0 -12px; } .actions button { min-height: 40px; padding: 3px 12px; } }
form.edit { width: 100%; max-width: 560px; margin-bottom: 12px; }
form.edit .buttons { display: flex; justify-content: flex-end; gap: 8px; margin-top: 8px; }
form.edit textarea, .field input[type="number"], .field input[type="password"] {
  width: 100%; border: 1px solid var(--line); background: var(--raised); border-radius: 12px; padding: 9px 14px;
  resize: none; line-height: 1.5; outline-offset: -1px;
}
.plain, .strong { min-height: 40px; padding: 0 16px; font-size: 15px; border-radius: 20px; }
.plain:hover { background: var(--bubble); }
.strong { background: var(--accent); color: var(--on-accent); font-weight: 600; }

#welcome { text-align: center; margin: 12vh 0 0; }
#welcome h2 { font-size: 26px; font-weight: 600; letter-spacing: -.01em; margin: 0 0 6px; overflow-wrap: anywhere; }
#welcome p { color: var(--quiet); margin: 0 auto 28px; max-width: 30em; text-wrap: balance; }
#welcome div { display: flex; flex-wrap: wrap; justify-content: center; gap: 10px; }
#welcome button { border: 1px solid var(--line); border-radius: 20px; padding: 8px 16px; font-size: 15px; }
#welcome button:hover { background: var(--bubble); }

#bottom { position: relative; padding-bottom: max(14px, env(safe-area-inset-bottom)); }
#bottom::before {  /* the text fades out above the input instead of being cut */
  content: ""; position: absolute; inset: -22px 0 auto; height: 22px; pointer-events: none;
  background: linear-gradient(transparent, var(--paper));
}
#notice { display: flex; justify-content: center; align-items: center; gap: 4px; font-size: 14px; color: var(--quiet); }
#notice button { color: var(--accent); font-weight: 600; padding: 4px 10px; min-height: 36px; }
#down {
  position: absolute; left: 50%; top: -48px; width: 38px; height: 38px; margin-left: -19px; border-radius: 50%;
  background: var(--raised); border: 1px solid var(--line); box-shadow: var(--shadow); display: grid;
  place-items: center;
}
#box {
  display: flex; align-items: flex-end; gap: 8px; padding: 7px; border: 1px solid var(--line); border-radius: 26px;
  background: var(--raised); box-shadow: var(--shadow);
}
#box:focus-within { border-color: var(--accent); }
#input {
  flex: 1; min-width: 0; resize: none; border: 0; outline: 0; background: none; padding: 6px 4px 6px 14px;
  line-height: 24px; max-height: min(220px, 35dvh);
}
::placeholder { color: var(--quiet); opacity: 1; }
#send, #stop { width: 36px; height: 36px; border-radius: 50%; display: grid; place-items: center; flex: none; }
#send, #stop { background: var(--accent); color: var(--on-accent); }
#send:disabled { background: var(--line); color: var(--quiet); cursor: default; }
#stop svg { fill: currentcolor; }

dialog {
  border: 1px solid var(--line); border-radius: 18px; padding: 22px 24px; width: min(400px, calc(100vw - 32px));
  background: var(--raised); color: var(--ink); box-shadow: var(--shadow);
}
dialog::backdrop { background: rgb(0 0 0 / 35%); }
dialog h2 { font-size: 18px; font-weight: 650; margin: 0 0 14px; }
dialog p { margin: 0 0 14px; font-size: 15px; line-height: 1.5; }
.field { display: block; margin-bottom: 18px; }
.field > span { display: flex; justify-content: space-between; font-weight: 550; font-size: 15px; }
.field small { display: block; color: var(--quiet); font-size: 13px; line-height: 1.4; margin-top: 5px; }
.field input { display: block; width: 100%; margin-top: 6px; accent-color: var(--accent); }
.field input:invalid { border-color: var(--alarm) !important; }
dialog .buttons { display: flex; justify-content: flex-end; gap: 8px; margin-top: 4px; }
@media (max-width: 560px) {
  #list, form#composer, #notice { padding-left: 14px; padding-right: 14px; }
  header { padding-left: max(14px, env(safe-area-inset-left)); padding-right: 6px; }
  header button span { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  header button { min-width: 44px; min-height: 44px; justify-content: center; padding: 0; }
  #send, #stop { width: 40px; height: 40px; }
  #input { padding-top: 8px; padding-bottom: 8px; }
  #welcome { margin-top: 8vh; }
}
@media (prefers-reduced-motion: reduce) { * { animation: none !important; transition: none !important; } }
"""

# %% [markdown]
# ### The skeleton
# What is there before the first word. Labels, live regions and dialogs are HTML's own, so keyboards and screen readers
# know them.

# %% tags=["folded"]
CHAT_BODY = r"""
<svg width="0" height="0" style="position:absolute" aria-hidden="true">
  <symbol id="up" viewBox="0 0 24 24"><path d="M12 19V5M6 11l6-6 6 6"/></symbol>
  <symbol id="downward" viewBox="0 0 24 24"><path d="M12 5v14M6 13l6 6 6-6"/></symbol>
  <symbol id="square" viewBox="0 0 24 24"><rect x="7" y="7" width="10" height="10" rx="1.5"/></symbol>
  <symbol id="plus" viewBox="0 0 24 24"><path d="M12 5v14M5 12h14"/></symbol>
  <symbol id="sliders" viewBox="0 0 24 24"><path d="M4 8h9M19 8h1M4 16h1M11 16h9"/><circle cx="16" cy="8" r="3"/>
    <circle cx="8" cy="16" r="3"/></symbol>
  <symbol id="calculator" viewBox="0 0 24 24"><rect x="5" y="3" width="14" height="18" rx="2.5"/>
    <path d="M9 7.5h6M9 12h.01M12 12h.01M15 12h.01M9 16.5h.01M12 16.5h.01M15 16.5h.01"/></symbol>
</svg>
<header>
  <div><h1 id="model">Chat</h1><span id="state" role="status">connecting</span></div>
  <button type="button" id="open-settings"><svg aria-hidden="true"><use href="#sliders"/></svg>
    <span>Settings</span></button>
  <button type="button" id="new"><svg aria-hidden="true"><use href="#plus"/></svg><span>New chat</span></button>
</header>
<main id="scroll" tabindex="0" aria-label="Conversation"><div id="list"></div></main>
<p id="told" class="unseen" role="status" aria-live="polite"></p>
<div id="bottom">
  <button type="button" id="down" aria-label="Go to the newest message" hidden>
    <svg aria-hidden="true"><use href="#downward"/></svg></button>
  <div id="notice" role="status" hidden><span></span><button type="button" id="undo">Undo</button></div>
  <form id="composer">
    <div id="box">
      <textarea id="input" rows="1" placeholder="Write a message" aria-label="Your message" enterkeyhint="send"
        autocomplete="off"></textarea>
      <button id="send" aria-label="Send" title="Send" disabled><svg aria-hidden="true"><use href="#up"/></svg></button>
      <button type="button" id="stop" aria-label="Stop" title="Stop (Esc)" hidden>
        <svg aria-hidden="true"><use href="#square"/></svg></button>
    </div>
  </form>
</div>
<dialog id="settings" aria-labelledby="settings-title"><form method="dialog">
  <h2 id="settings-title">Settings</h2>
  <label class="field"><span>Temperature <output id="temperature-shown"></output></span>
    <input type="range" id="temperature" min="0" max="2" step="0.1">
    <small>0: always the likeliest token. Higher: more varied.</small></label>
  <label class="field"><span>Top-k</span>
    <input type="number" id="top_k" min="0" max="200" step="1" inputmode="numeric" required>
    <small>Only the k likeliest tokens may come; 0 = off.</small></label>
  <label class="field"><span>Longest answer, in tokens</span>
    <input type="number" id="max_tokens" min="1" max="4096" step="1" inputmode="numeric" required>
    <small id="room">Taken from the model's context.</small></label>
  <div class="buttons"><button type="button" class="plain" id="defaults">Defaults</button>
    <button class="strong">Done</button></div>
</form></dialog>
<dialog id="ask" aria-labelledby="ask-title"><form method="dialog">
  <h2 id="ask-title">This chat needs its token</h2>
  <p>It stands in the address that was printed when the chat started, after <code>#token=</code>.</p>
  <label class="field"><span>Token</span>
    <input type="password" id="token" autocomplete="off" spellcheck="false" required></label>
  <div class="buttons"><button class="strong">Go on</button></div>
</form></dialog>
"""

# %% [markdown]
# ### Talking to the server
# Storage may be forbidden inside another site's frame; then everything works, only without a memory. `eventsOf` is
# the careful part: bytes become text only when a letter is complete, text becomes an event only at its blank line.

# %% tags=["folded"]
CHAT_SCRIPT_NETWORK = r"""
const $ = (id) => document.getElementById(id);
const MEMORY = "nanochat" + location.pathname;  // behind a proxy several chats share one origin

function recall(area, name, fallback) {
  try { return JSON.parse(window[area].getItem(MEMORY + name)) ?? fallback; } catch { return fallback; }
}
function remember(area, name, value) {
  try { window[area].setItem(MEMORY + name, JSON.stringify(value)); } catch { return false; }  // blocked or full
  return true;
}

let token = recall("sessionStorage", "token", "");
function takeToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!given) return false;
  remember("sessionStorage", "token", token = given);
  history.replaceState(null, "", location.pathname + location.search);  // not into bookmarks and screenshots
  return true;
}

async function request(path, options = {}) {
  const headers = {...options.headers, ...(token && {Authorization: "Bearer " + token})};
  let response;
  try {
    response = await fetch(path, {cache: "no-store", ...options, headers});
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Error("The server cannot be reached. Is the program or notebook that started this chat still running?");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  const error = new Error(told?.error?.message || `The server answered with status ${response.status}. Try it again.`);
  error.status = response.status;
  throw error;
}

async function* eventsOf(stream) {
  const reader = stream.getReader(), decoder = new TextDecoder();
  let waiting = "";
  try {
    for (let finished = false; !finished;) {
      const {done, value} = await reader.read();
      finished = done;
      waiting += done ? decoder.decode() + "\n\n" : decoder.decode(value, {stream: true});
      const events = waiting.split(/\r?\n\r?\n/);
      waiting = events.pop();
      for (const event of events) {
        const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (data.length) yield data.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

let contextLength = Infinity;
async function greet() {
  try {
    const model = (await (await request("v1/models")).json()).data[0];
    contextLength = model.context_length || Infinity;
    $("model").textContent = document.title = model.id;
    drawSettings();
    if (!messages.length) drawList();
  } catch (error) {
    if (error.status === 401) askForToken();
  }
  showHealth();
}

let healthTimer;
async function showHealth() {
  clearTimeout(healthTimer);
  const state = $("state");
  try {
    const health = await (await request("health")).json();
    if (state.className === "away" && $("model").textContent === "Chat") greet();
    state.className = "ready";
    state.textContent = health.waiting ? `busy, ${health.waiting} waiting` : "ready";
  } catch (error) {
    state.className = "away";
    state.textContent = error.status ? "failed" : "not reachable";
    healthTimer = setTimeout(showHealth, 3000);
  }
}
"""

# %% [markdown]
# ### Showing an answer
# A little Markdown (code, bold, headings, lists), built from DOM nodes, line by line. While the answer grows only its
# last line is replaced, so one can already select and copy what stands above.

# %% tags=["folded"]
CHAT_SCRIPT_TEXT = r"""
function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}
function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("aria-hidden", "true");
  svg.append(document.createElementNS("http://www.w3.org/2000/svg", "use"));
  svg.firstChild.setAttribute("href", "#" + name);
  return svg;
}

const isCall = (piece) => typeof piece === "object";
const textOf = (message) => message.role === "user" ? message.text
  : message.parts.map((part) => part.text ?? "").join("");

function callNode(call) {
  const label = make("span", {className: "unseen", textContent: "Calculator: "});
  const sum = call.result === null ? make("span", {}, call.expression, " → no answer")
    : make("span", {}, call.expression, " = ", make("b", {textContent: call.result}));
  const className = call.result === null ? "call failed" : "call";
  return make("span", {className, title: "The model used its calculator"}, icon("calculator"), label, sum);
}

function inlineNodes(piece) {
  if (isCall(piece)) return [callNode(piece)];
  return piece.split(/(`[^`]+`|\*\*\p{L}[^*]*\*\*)/u).filter(Boolean).map((bit) =>
    bit.length > 2 && bit.startsWith("`") ? make("code", {textContent: bit.slice(1, -1)})
    : bit.startsWith("**") && bit.endsWith("**") && bit.length > 4 ? make("strong", {textContent: bit.slice(2, -2)})
    : bit);
}

function linesOf(parts) {  // each line is a list of strings and calculator calls
  const lines = [[]];
  for (const part of parts) {
    if (part.text === undefined) { lines.at(-1).push(part); continue; }
    part.text.split("\n").forEach((text, i) => {
      if (i) lines.push([]);
      if (text) lines.at(-1).push(text);
    });
  }
  return lines;
}

function blocksOf(parts) {
  const blocks = [];
  let code = null;
  for (const line of parts.length ? linesOf(parts) : []) {
    const start = isCall(line[0]) ? "" : line[0] ?? "";
    if (/^\s*```/.test(start)) {
      code = code ? null : make("code");
      if (code) blocks.push(make("pre", {tabIndex: 0}, code));
    } else if (code) {
      code.append(...line.map((piece) => isCall(piece) ? callNode(piece) : piece), "\n");
    } else {
      const title = /^#{1,6} /.exec(start);
      if (title) line[0] = start.slice(title[0].length);
      const kind = title ? "title" : /^\s*([-*•]|\d+[.)]) /.test(start) ? "item" : "";
      blocks.push(make("p", {className: kind}, ...line.flatMap(inlineNodes)));
    }
  }
  return blocks;
}

function patch(host, blocks) {
  blocks.forEach((block, i) => {
    if (i >= host.children.length) host.append(block);
    else if (!host.children[i].isEqualNode(block)) host.children[i].replaceWith(block);
  });
  while (host.children.length > blocks.length) host.lastElementChild.remove();
}
"""

# %% [markdown]
# ### The conversation
# A list of messages, drawn from top to bottom and kept in the browser's storage. An answer is a list of parts, text
# and calculator calls in the order in which they came; that is also how it goes back to the server with the next
# question. Whatever is replaced (by an edit, a new answer, a new chat) can be brought back.

# %% tags=["folded"]
CHAT_SCRIPT_CONVERSATION = r"""
function keptMessages() {
  const kept = recall("localStorage", "messages", []);
  const whole = (one) => one?.role === "user" ? typeof one.text === "string" : Array.isArray(one?.parts);
  return Array.isArray(kept) ? kept.filter(whole) : [];
}
let messages = keptMessages();
let unkept = false;  // the storage is blocked or full
let running = null;  // {controller, message} while an answer is being written
let replaced = null;  // the messages before the last edit, new answer or new chat
let follows = true;  // the reader is at the bottom and wants to stay there
const nodes = new WeakMap();
for (const message of messages) if (message.state === "writing") message.state = "stopped";

let lastKept = 0;
function keep() { lastKept = Date.now(); unkept = !remember("localStorage", "messages", messages); }

function requestMessages(list) {
  const out = [];
  // A question that was refused, and the refusal, would only get the next one refused as well.
  for (const message of list.filter((one, i) => !one.refused && !list[i + 1]?.refused)) {
    if (message.role === "user") {  // two in a row stand where an answer failed
      if (out.at(-1)?.role === "user") out.at(-1).content += "\n\n" + message.text;
      else out.push({role: "user", content: message.text});
    } else if (message.parts.some((part) => part.text === undefined)) {
      out.push({role: "assistant", content: message.parts.flatMap((part) => part.text !== undefined
        ? [{type: "text", text: part.text}]
        : [{type: "python", text: part.expression},
           ...(part.result === null ? [] : [{type: "python_output", text: part.result}])])});
    } else if (textOf(message).trim()) {
      out.push({role: "assistant", content: textOf(message)});
    }
  }
  // The server takes 500 messages of 32,000 characters in all, which is more than a model can read.
  let dropped = 0;
  while (out.length > 2 && (out.length > 400 || JSON.stringify(out).length > 30000)) {
    out.splice(0, 2);
    dropped += 2;
  }
  return [out, dropped];
}

async function writeAnswer() {
  const controller = new AbortController();
  const [sent, dropped] = requestMessages(messages);
  const body = JSON.stringify({messages: sent, stream: true, temperature: settings.temperature,
    top_k: settings.top_k, max_tokens: answerTokens()});
  const message = {role: "assistant", parts: [], state: "writing"};
  running = {controller, message};
  messages.push(message);
  keep();
  follows = true;
  drawList();
  $("told").textContent = "The model is writing.";
  try {
    const response = await request("v1/chat/completions", {method: "POST", body, signal: controller.signal,
      // Jupyter's proxy passes an answer on piece by piece only when it is asked for in exactly these words.
      headers: {"Content-Type": "application/json", Accept: "text/event-stream"}});
    for await (const data of eventsOf(response.body)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw Object.assign(new Error(chunk.error.message), {told: true});
      takeChunk(message, chunk, dropped);
      scheduleDrawing(message);
    }
    if (!message.finish) throw new TypeError("the stream ended early");
    message.state = "done";
  } catch (error) {
    message.state = controller.signal.aborted ? "stopped" : "error";
    message.refused = error.status === 400;
    if (!controller.signal.aborted) {
      message.error = error.status || error.told || error.constructor === Error ? error.message
        : "The connection broke off before the answer was complete.";
      if (error.status === 401) { message.needsToken = true; askForToken(); }
    }
  }
  if (running?.message === message) running = null;
  keep();
  if (nodes.get(message)?.isConnected) drawMessage(message);
  drawControls();
  $("told").textContent = message.error ?? textOf(message);
  showHealth();
}

function takeChunk(message, chunk, dropped) {
  if (chunk.left_out_messages !== undefined) message.leftOut = dropped + chunk.left_out_messages;
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const {content, calculator} = choice.delta ?? {};
  if (content) {
    const last = message.parts.at(-1);
    if (last?.text !== undefined) last.text += content;
    else message.parts.push({text: content});
  }
  for (const {expression, result} of calculator ?? []) {
    message.parts.push({expression: String(expression), result: result == null ? null : String(result)});
  }
  if (choice.finish_reason) message.finish = choice.finish_reason;
}

let drawingIsDue = false;
function scheduleDrawing(message) {
  if (Date.now() - lastKept > 300) keep();
  if (drawingIsDue) return;
  drawingIsDue = true;
  requestAnimationFrame(() => {
    drawingIsDue = false;
    const text = nodes.get(message)?.querySelector(".text");
    if (text && message.state === "writing") patch(text, blocksOf(message.parts));
    stayAtBottom();
  });
}

function send(text) {
  if (running || !text.trim()) return false;
  replaced = null;
  messages.push({role: "user", text});
  writeAnswer();
  return true;
}

function cutAt(index, words) {  // what is cut off can be brought back
  running?.controller.abort();
  running = null;
  const lost = messages.slice(index).some((message) => textOf(message).trim());
  replaced = lost ? {messages, words} : null;
  messages = messages.slice(0, index);
}

function regenerate(message) {
  cutAt(messages.indexOf(message), "The earlier answer was replaced.");
  writeAnswer();
  focusInput();
}

function editNode(message, node) {
  const area = make("textarea", {value: message.text, rows: 1, ariaLabel: "Edit your message"});
  const form = make("form", {className: "edit"}, area, make("div", {className: "buttons"},
    make("button", {type: "button", className: "plain", textContent: "Cancel", onclick: () => close()}),
    make("button", {className: "strong", textContent: "Send"})));
  const close = () => { drawMessage(message); nodes.get(message).querySelector("button").focus(); };
  form.onsubmit = (event) => {
    event.preventDefault();
    const text = area.value;
    if (!text.trim()) return;
    cutAt(messages.indexOf(message), "The conversation goes on from here.");
    messages.push({role: "user", text});
    writeAnswer();
    focusInput();
  };
  area.onkeydown = (event) => {
    if (event.key === "Escape") close();
    else sendOnEnter(event, form);
  };
  area.oninput = () => fit(area);
  node.replaceChildren(form);
  fit(area);
  area.focus();
}

async function copy(message, button) {
  const text = textOf(message);
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // no permission in a frame, or no secure connection
    const area = document.body.appendChild(make("textarea", {value: text, className: "unseen"}));
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

function drawMessage(message) {
  const node = make("article", {className: message.role});
  const action = (textContent, act) => make("button", {type: "button", textContent, onclick: (e) => act(e.target)});
  const actions = make("div", {className: "actions"});
  if (message.role === "user") {
    node.append(make("h2", {className: "unseen", textContent: "You"}),
      make("div", {className: "text", textContent: message.text}), actions);
    actions.append(action("Edit", () => editNode(message, node)));
  } else {
    const text = make("div", {className: "text"}, ...blocksOf(message.parts));
    const note = (textContent) => node.append(make("p", {className: "note", textContent}));
    node.append(make("h2", {className: "unseen", textContent: "Answer"}), text);
    if (message.state === "writing") node.classList.add("writing");
    else {
      const empty = !message.parts.length;
      if (message.leftOut === 1) note("The first message no longer fit and was left out.");
      else if (message.leftOut) note(`The first ${message.leftOut} messages no longer fit and were left out.`);
      if (unkept) note("This browser does not keep the conversation: when the page is reloaded, it is gone.");
      if (message.finish === "length") note("The answer reached its longest length; Settings allow a longer one.");
      if (message.state === "stopped") note(empty ? "Stopped before the first word." : "Stopped.");
      if (message.state === "done" && empty) note("The model had nothing to say.");
      if (message.state === "error") {
        node.append(make("div", {className: "error", role: "alert"}, make("span", {textContent: message.error}),
          action("Try again", () => regenerate(message))));
      } else {
        actions.append(action("Copy", (button) => copy(message, button)), action("Regenerate",
          () => regenerate(message)));
        node.append(actions);
      }
    }
  }
  nodes.get(message)?.replaceWith(node);
  nodes.set(message, node);
  stayAtBottom();
  return node;
}

function welcome() {
  const ideas = ["Why is the sky blue?", "What is 12 times 37?", "Write a poem about autumn."];
  const name = $("model").textContent;
  return make("section", {id: "welcome"}, make("h2", {textContent: name === "Chat" ? name : "Talk to " + name}),
    make("p", {textContent: "A small model: quick to train, quick to answer, and often wrong."}),
    make("div", {}, ...ideas.map((textContent) => make("button", {type: "button", textContent,
      onclick: () => { send(textContent); focusInput(); }}))));
}

function drawList() {
  $("list").replaceChildren(...(messages.length ? messages.map(drawMessage) : [welcome()]));
  drawControls();
  stayAtBottom();
}
"""

# %% [markdown]
# ### The controls
# Enter sends and Shift+Enter begins a line, except while an input method is composing a character: there Enter means
# "this one". The page scrolls along only for a reader who is at the bottom.

# %% tags=["folded"]
CHAT_SCRIPT_CONTROLS = r"""
const DEFAULTS = {temperature: 0.8, top_k: 50, max_tokens: null};  // null: 512, or half of a shorter context
const settings = {...DEFAULTS, ...recall("localStorage", "settings", {})};
const answerTokens = () => Math.min(settings.max_tokens ?? Math.min(512, Math.floor(contextLength / 2)), contextLength);

function drawSettings() {
  $("temperature").value = settings.temperature;
  $("temperature-shown").value = Number(settings.temperature).toFixed(1);
  $("top_k").value = settings.top_k;
  $("max_tokens").max = Math.min(4096, contextLength);
  $("max_tokens").value = answerTokens();
  if (contextLength < Infinity) $("room").textContent =
    `Taken from the model's context of ${contextLength} tokens.`;
}
for (const name of Object.keys(DEFAULTS)) $(name).oninput = () => {
  if (!$(name).checkValidity()) return;
  settings[name] = Number($(name).value);
  $("temperature-shown").value = settings.temperature.toFixed(1);
  remember("localStorage", "settings", settings);
};
$("defaults").onclick = () => {
  remember("localStorage", "settings", Object.assign(settings, DEFAULTS));
  drawSettings();
};
$("open-settings").onclick = () => { drawSettings(); $("settings").showModal(); };
$("settings").onclick = (event) => { if (event.target === $("settings")) $("settings").close(); };

function askForToken() { if (!$("ask").open) $("ask").showModal(); }
function goOnWithToken() {
  greet();
  const last = messages.at(-1);
  if (last?.needsToken && !running) regenerate(last);
}
$("ask").firstElementChild.onsubmit = () => {
  // the whole printed address will do as well
  remember("sessionStorage", "token", token = $("token").value.trim().replace(/^.*#token=/, ""));
  $("token").value = "";
  goOnWithToken();
};
addEventListener("hashchange", () => { if (takeToken()) { $("ask").close(); goOnWithToken(); } });

const input = $("input"), scroller = $("scroll");
function fit(area) {
  area.style.height = "auto";
  area.style.height = area.scrollHeight + area.offsetHeight - area.clientHeight + "px";
}
function focusInput() { if (matchMedia("(hover: hover)").matches) input.focus(); }  // no keyboard popping up on phones
function sendOnEnter(event, form) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  form.requestSubmit();
}
function drawControls() {
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  $("send").disabled = !input.value.trim();
  $("notice").hidden = !replaced;
  $("notice").firstElementChild.textContent = replaced?.words ?? "";
  $("new").disabled = !messages.length;
}
function stop() { running?.controller.abort(); }

input.value = recall("localStorage", "draft", "");
input.oninput = () => { fit(input); drawControls(); remember("localStorage", "draft", input.value); };
input.onkeydown = (event) => { if (event.key === "Escape") stop(); else sendOnEnter(event, $("composer")); };
$("composer").onsubmit = (event) => {
  event.preventDefault();
  if (!send(input.value)) return;
  input.value = "";
  input.oninput();
};
$("stop").onclick = () => { stop(); focusInput(); };
$("new").onclick = () => { cutAt(0, "A new chat."); keep(); drawList(); focusInput(); };
$("undo").onclick = () => {
  stop();
  messages = replaced.messages;
  replaced = running = null;
  keep();
  drawList();
  focusInput();
};

function stayAtBottom() { if (follows) scroller.scrollTop = scroller.scrollHeight; $("down").hidden = follows; }
scroller.onscroll = () => {
  follows = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 24;
  $("down").hidden = follows;
};
$("down").onclick = () => { follows = true; stayAtBottom(); };
new ResizeObserver(stayAtBottom).observe(scroller);
addEventListener("pagehide", () => { if (running) keep(); stop(); });
addEventListener("storage", (event) => {  // another tab goes on with this conversation
  if (event.key !== MEMORY + "messages" || running) return;
  messages = keptMessages();
  replaced = null;
  drawList();
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) showHealth(); });

takeToken();
drawSettings();
drawList();
fit(input);
greet();
if (parent === window) focusInput();  // inside a notebook the focus is the notebook's
else parent.postMessage("nanochat page is here", "*");  // `show_chat` waits for this
"""

# %% [markdown]
# ### `CHAT_PAGE`
# All of it in one string. The policy in its head names the script by its hash: whatever else might get into the page
# would not run, and it can talk to the server that it came from and to nobody else.

# %%
CHAT_SCRIPT = '"use strict";' + "".join(
    (CHAT_SCRIPT_NETWORK, CHAT_SCRIPT_TEXT, CHAT_SCRIPT_CONVERSATION, CHAT_SCRIPT_CONTROLS)
)

CHAT_PAGE = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; connect-src 'self';
  img-src data:; base-uri 'none'; form-action 'none';
  script-src 'sha256-{base64.b64encode(hashlib.sha256(CHAT_SCRIPT.encode()).digest()).decode()}'">
<meta name="viewport"
  content="width=device-width, initial-scale=1, viewport-fit=cover, interactive-widget=resizes-content">
<meta name="referrer" content="no-referrer">
<title>Chat</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Cpath
 fill='%230072B2' d='M3 2h10a2 2 0 0 1 2 2v6a2 2 0 0 1-2 2H8l-4 3v-3H3a2 2 0 0 1-2-2V4a2 2 0 0 1 2-2z'/%3E%3C/svg%3E">
<style>{CHAT_STYLE}</style>
</head>
<body>{CHAT_BODY}<script>{CHAT_SCRIPT}</script></body>
</html>
"""

# %% [markdown]
# ### `show_chat`
# The server listens on the kernel's machine, the reader's browser may be on another one, and a public link would be an
# open door. So a small script in the output looks for an address that this browser reaches: the machine itself,
# Colab's own proxy, or Jupyter's (`jupyter-server-proxy`). Only the page itself can say that it has been found, by a
# message out of its frame; a proxy's error page cannot. Until then, and for ever in a saved notebook whose kernel is
# gone, one sentence stands there instead of a broken frame.

# %%
CHAT_OUTPUT = """<div id="ELEMENT">
<p>The chat runs while this notebook's kernel does; run this cell again.</p>
<div style="display: none">
<p>If the kernel is running, this browser cannot reach it. Three ways that work:</p>
<ul>
<li><code>pip install jupyter-server-proxy</code> where Jupyter runs, restart Jupyter, and run this cell again;</li>
<li><code>ssh -L PORT:127.0.0.1:PORT HOST</code> on your own computer (HOST is the kernel's), then open
<a target="_blank" rel="noopener">http://127.0.0.1:PORT/</a>;</li>
<li><code>chat_in_terminal(chat_model, tokenizer)</code> in a new cell: the chat without a page.</li>
</ul>
</div>
<script>
(async () => {
  const box = document.getElementById("ELEMENT"), [sentence, ways] = box.children, fragment = "#token=" + TOKEN;
  const direct = "http://127.0.0.1:PORT/", colab = window.google?.colab?.kernel;
  const inEditor = location.protocol === "vscode-webview:" || location.hostname.endsWith(".vscode-cdn.net");
  const places = [];  // [address, seconds that it may take]
  box.querySelector("a").href = direct + fragment;
  if (colab) {
    if (!colab.accessAllowed) return;  // somebody else's notebook, or no kernel
    sentence.textContent = "Looking for the chat…";
    places.push([await colab.proxyPort(PORT).catch(() => null), 20]);
  } else {
    if (inEditor || ["localhost", "127.0.0.1", "[::1]"].includes(location.hostname)) places.push([direct, 5]);
    if (!inEditor) {
      const config = document.getElementById("jupyter-config-data");
      const base = (config && JSON.parse(config.textContent).baseUrl) || document.body.dataset.baseUrl
        || location.pathname.replace(/\\/(lab|notebooks|tree|doc|nbclassic|edit)(\\/.*)?$/, "/");
      places.push([new URL(base.replace(/\\/*$/, "/proxy/PORT/"), location.href).href, 8]);
    }
    sentence.textContent = "Looking for the chat…";
  }
  for (const [address, seconds] of places) {
    if (!address) continue;
    const frame = document.createElement("iframe");
    frame.title = "Chat";
    frame.allow = "clipboard-write";
    frame.style.cssText = "width: 100%; height: 0; border: 0; box-sizing: border-box";
    const found = await new Promise((resolve) => {
      addEventListener("message", (event) => {
        if (event.source === frame.contentWindow && event.data === "nanochat page is here") resolve(true);
      });
      frame.onload = () => setTimeout(resolve, 500, false);  // something came, and it was not the page
      setTimeout(resolve, 1000 * seconds, false);
      frame.src = new URL(fragment, address).href;
      box.append(frame);
    });
    if (found) {
      sentence.remove();
      ways.remove();
      frame.style.height = "HEIGHTpx";
      frame.style.boxShadow = "inset 0 0 0 1px rgb(128 128 128 / 30%)";
      frame.style.padding = "1px";
      return;
    }
    frame.remove();
  }
  sentence.textContent = "The chat runs while this notebook's kernel does; run this cell again.";
  ways.style.display = colab ? "none" : "block";
})();
</script>
</div>
"""


def show_chat(port: int, token: str, height: int = 640) -> None:
    """Show the chat of the server on 127.0.0.1:`port` below the cell; outside a notebook print its address.

    token: this server's own random one. It stands in the cell's output, because only there can the reader's browser
    find it again after the tab was reloaded; it opens nothing but a loopback port, and dies with the kernel. So never
    pass a password here. height: CSS pixels.
    """
    if not in_notebook():
        print0(f"Chat: http://127.0.0.1:{port}/#token={token}")
        return
    values = {
        "ELEMENT": f"chat-{uuid.uuid4().hex}",  # a cell that ran twice, or was copied, has its own place
        "PORT": str(int(port)),
        "HEIGHT": str(int(height)),
        "TOKEN": json.dumps(token).replace("<", "\\u003c"),
    }
    source = CHAT_OUTPUT
    for name, value in values.items():
        source = source.replace(name, value)
    show_html(source)
