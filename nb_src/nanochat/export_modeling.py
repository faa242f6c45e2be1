# %% [markdown]
# ## The model for other people's programs
#
# Most of the world runs language models with the `transformers` library. It has a nanochat model of its own, but an
# early one: no value embeddings, no scalars, no windows. For such models a folder may bring Python files along, and
# whoever loads it says `trust_remote_code=True`. These are the files.
#
# They stand here as text because they are to be read by another program in another place; nothing in this notebook
# runs them. They share no line with the chapters above, so they also serve as a second opinion: a test compares the
# two models number by number.

# %%
import textwrap

# %% [markdown]
# ### The configuration
# The names of `GPTConfig`, and in `attribute_map` what the library calls the same things.

# %%
EXPORT_CONFIGURATION_SOURCE = r'''"""Configuration of a nanochat GPT for the transformers library."""

from transformers import PretrainedConfig


class NanochatGPTConfig(PretrainedConfig):
    """Shape and constants of the model.

    sequence_len: tokens that it was trained to read. window_pattern: one letter for each layer, repeated; L looks
    sequence_len tokens back and S half as far; the last layer is L whatever the pattern says. vocab_multiple: what the
    tables were padded to in training; here they are not.
    """

    model_type = "nanochat_gpt"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "max_position_embeddings": "sequence_len",
    }

    def __init__(
        self,
        sequence_len=2048,
        vocab_size=32768,
        n_layer=12,
        n_head=6,
        n_kv_head=6,
        n_embd=768,
        window_pattern="SSSL",
        rope_base=10000.0,
        logit_softcap=15.0,
        ve_gate_channels=32,
        vocab_multiple=64,
        use_cache=True,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.sequence_len, self.vocab_size = sequence_len, vocab_size
        self.n_layer, self.n_head, self.n_kv_head, self.n_embd = n_layer, n_head, n_kv_head, n_embd
        self.window_pattern, self.rope_base, self.logit_softcap = window_pattern, rope_base, logit_softcap
        self.ve_gate_channels, self.vocab_multiple, self.use_cache = ve_gate_channels, vocab_multiple, use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def tokens_back(self, layer):
        """How far before its own position a token of this layer looks."""
        letter = self.window_pattern.upper()[layer % len(self.window_pattern)]
        return self.sequence_len // 2 if letter == "S" and layer < self.n_layer - 1 else self.sequence_len

    def has_value_embedding(self, layer):
        return (self.n_layer - 1 - layer) % 2 == 0
'''

# %% [markdown]
# ### The model
# Weights have the names that they have in the checkpoint. Keys and values go into the library's cache, windows and
# padding become one boolean mask, and the rotary angles are computed for whatever positions come, so nothing ends
# where a table ends.

# %%
EXPORT_MODELING_SOURCE = r'''"""A nanochat GPT for the transformers library."""

import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_nanochat_gpt import NanochatGPTConfig

if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 4):
    raise ImportError(
        f"this model needs transformers 5.4 or newer, and this is {transformers.__version__}: "
        "pip install --upgrade transformers"
    )
from transformers import initialization  # noqa: E402  (older versions have none)


def norm(x):
    """RMS norm of the last dimension; there is nothing to learn in it."""
    return F.rms_norm(x, (x.size(-1),))


def rotate(x, cos, sin):  # x (B, T, H, D); cos, sin (B, T, 1, D/2)
    """Turn the channel pairs (i, i + D/2) by minus the angle."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim, self.gate_channels = layer, config.n_embd // config.n_head, config.ve_gate_channels
        kv_width = config.n_kv_head * self.head_dim
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_k = nn.Linear(config.n_embd, kv_width, bias=False)
        self.c_v = nn.Linear(config.n_embd, kv_width, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        if config.has_value_embedding(layer):
            self.ve_gate = nn.Linear(self.gate_channels, config.n_kv_head, bias=False)

    def forward(self, x, value_embedding, cos, sin, mask, cache):
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)) for linear in (self.c_q, self.c_k, self.c_v))
        if value_embedding is not None:
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., : self.gate_channels]))
            v = v + gate[..., None] * value_embedding.view_as(v)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.size(1) != k.size(1))
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x, *attention_inputs):
        x = x + self.attn(norm(x), *attention_inputs)
        return x + self.mlp(norm(x))


class NanochatGPTForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = NanochatGPTConfig
    _no_split_modules = ["Block"]
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        kv_width = config.n_kv_head * (config.n_embd // config.n_head)
        blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(config.vocab_size, config.n_embd), "h": blocks})
        self.value_embeds = nn.ModuleDict(
            {
                str(layer): nn.Embedding(config.vocab_size, kv_width)
                for layer in range(config.n_layer)
                if config.has_value_embedding(layer)
            }
        )
        self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer["wte"]

    def get_output_embeddings(self):
        return self.lm_head

    def resize_token_embeddings(self, *args, **kwargs):
        raise NotImplementedError("this model has a table of values for each token in half of its layers: no resizing")

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self:  # the library's own functions leave alone what was loaded
            initialization.ones_(self.resid_lambdas)
            initialization.zeros_(self.x0_lambdas)

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, **kwargs):
        """`forward` makes the masks of its layers itself, whichever cache it is given."""
        return attention_mask

    def masks(self, attention_mask, past, length, total):
        """Tokens back -> bool (B or 1, 1, length, total): who sees whom, by place in the cache."""
        device = self.lm_head.weight.device
        distance = past + torch.arange(length, device=device)[:, None] - torch.arange(total, device=device)
        lefts = {self.config.tokens_back(layer) for layer in range(self.config.n_layer)}
        masks = {left: ((distance >= 0) & (distance <= left))[None, None] for left in lefts}
        if attention_mask is None:
            return masks
        real = F.pad(attention_mask.bool(), (0, total - attention_mask.size(1)), value=True)[:, None, None]
        # A token of the padding sees itself: a softmax over nothing is not a number.
        return {left: mask & real | (distance == 0) for left, mask in masks.items()}

    def angles(self, position_ids, dtype):
        """cos and sin for the rotation, (B, T, 1, D/2) each."""
        width = self.config.n_embd // self.config.n_head
        exponents = -torch.arange(0, width, 2, dtype=torch.float32, device=position_ids.device) / width
        angles = position_ids[..., None, None].float() * self.config.rope_base**exponents
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """input_ids (B, T); attention_mask (B, tokens in the cache + T), 0 for padding. Logits are fp32."""
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("this model looks up more than one table by token: it needs input_ids, not inputs_embeds")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        length, past, total = input_ids.size(1), 0, input_ids.size(1)
        if past_key_values is not None:
            past = past_key_values.get_seq_length()
            total, offset = past_key_values.get_mask_sizes(length, 0)
            if offset:
                raise ValueError("this cache forgets the oldest tokens; the model needs one that keeps all of them")
        if attention_mask is not None and (attention_mask.dim() != 2 or attention_mask.size(1) != past + length):
            raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}; it must be (batch, {past + length})")
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
        elif position_ids is None:
            position_ids = past + torch.arange(length, device=input_ids.device)[None]

        x0 = norm(self.transformer["wte"](input_ids))
        cos, sin = self.angles(position_ids, x0.dtype)
        masks = self.masks(attention_mask, past, length, total)
        x = x0
        for layer, block in enumerate(self.transformer["h"]):
            x = self.resid_lambdas[layer] * x + self.x0_lambdas[layer] * x0
            has_table = self.config.has_value_embedding(layer)
            value_embedding = self.value_embeds[str(layer)](input_ids) if has_table else None
            x = block(x, value_embedding, cos, sin, masks[self.config.tokens_back(layer)], past_key_values)

        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        softcap = self.config.logit_softcap
        logits = softcap * torch.tanh(self.lm_head(norm(x[:, kept])).float() / softcap)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
'''

# %% [markdown]
# ### The chat template
# The library turns a conversation into one string and cuts that into tokens. Then a user who types `<|assistant_end|>`
# has ended the assistant's turn. This template breaks such words apart with a space, `< |assistant_end|>`: programs
# that read nothing but the template are safe, and the text is changed by one character.

# %%
EXPORT_CHAT_TEMPLATE = textwrap.dedent("""\
    {#- Special tokens that a message spells out are broken apart with a space: a message cannot change who speaks. -#}
    {%- macro plain(text) -%}
        {%- set safe = namespace(text=text) -%}
        {%- for name in SPECIAL_TOKEN_NAMES -%}
            {%- set safe.text = safe.text | replace(name, "< " ~ name[1:]) -%}
        {%- endfor -%}
        {{- safe.text -}}
    {%- endmacro -%}
    {%- macro whole(content) -%}
        {%- if content is string -%}
            {{- content -}}
        {%- else -%}
            {%- for part in content -%}
                {%- if part.type != "text" -%}
                    {{- raise_exception("a user or system message can hold text only") -}}
                {%- endif -%}
                {{- part.text -}}
            {%- endfor -%}
        {%- endif -%}
    {%- endmacro -%}
    {%- set state = namespace(system="", turns=messages) -%}
    {%- if messages[0].role == "system" -%}
        {%- if messages | length < 2 -%}
            {{- raise_exception("a system message must be followed by a user message") -}}
        {%- endif -%}
        {%- set state.system = whole(messages[0].content) ~ "\\n\\n" -%}
        {%- set state.turns = messages[1:] -%}
    {%- endif -%}
    {{- "<|bos|>" -}}
    {%- for message in state.turns -%}
        {%- if message.role != ("user" if loop.index0 is even else "assistant") -%}
            {{- raise_exception("messages must alternate between user and assistant, user first") -}}
        {%- endif -%}
        {%- if message.role == "user" -%}
            {{- "<|user_start|>" ~ plain((state.system if loop.first else "") ~ whole(message.content)) -}}
            {{- "<|user_end|>" -}}
        {%- else -%}
            {{- "<|assistant_start|>" -}}
            {%- if message.content is string -%}
                {{- plain(message.content) -}}
            {%- else -%}
                {%- set open = namespace(text="") -%}
                {%- for part in message.content -%}
                    {%- if part.type == "text" -%}
                        {%- set open.text = open.text ~ part.text -%}
                    {%- else -%}
                        {{- plain(open.text) -}}
                        {%- set open.text = "" -%}
                        {%- if part.type == "python" -%}
                            {{- "<|python_start|>" ~ plain(part.text) ~ "<|python_end|>" -}}
                        {%- elif part.type == "python_output" -%}
                            {{- "<|output_start|>" ~ plain(part.text) ~ "<|output_end|>" -}}
                        {%- else -%}
                            {{- raise_exception("a part can be text, python or python_output") -}}
                        {%- endif -%}
                    {%- endif -%}
                {%- endfor -%}
                {{- plain(open.text) -}}
            {%- endif -%}
            {{- "<|assistant_end|>" -}}
        {%- endif -%}
    {%- endfor -%}
    {%- if add_generation_prompt -%}
        {{- "<|assistant_start|>" -}}
    {%- endif -%}
""")

# %% [markdown]
# ### The tokenizer
# With its own class the library does better than one string: each text is cut into tokens by itself, and the special
# tokens are put between the results, so the ids are exactly those that the model was trained on.

# %%
EXPORT_TOKENIZATION_SOURCE = r'''"""The tokenizer of a nanochat GPT for the transformers library."""

from transformers import PreTrainedTokenizerFast


class RenderedConversation(str):
    """What the chat template wrote. Its special tokens are meant, and those of the messages are broken apart."""


def replace_surrogates(text):
    """Halves of characters, which no UTF-8 can hold, become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class NanochatGPTTokenizer(PreTrainedTokenizerFast):
    """Byte-level BPE. Text that spells out a special token stays text, alone and in conversations."""

    @classmethod
    def from_pretrained(cls, *args, split_special_tokens=True, **kwargs):
        return super().from_pretrained(*args, split_special_tokens=split_special_tokens, **kwargs)

    def _encode_plus(self, text, text_pair=None, add_special_tokens=True, split_special_tokens=None, **kwargs):
        texts = text if isinstance(text, (list, tuple)) else [text]
        if texts and all(isinstance(one, RenderedConversation) for one in texts):
            add_special_tokens = split_special_tokens = False
        if all(isinstance(one, str) for one in texts):
            texts = [replace_surrogates(one) for one in texts]
            text = texts if isinstance(text, (list, tuple)) else texts[0]
        return super()._encode_plus(
            text, text_pair, add_special_tokens, split_special_tokens=split_special_tokens, **kwargs
        )

    def conversation_pieces(self, messages, add_generation_prompt=False):
        """What a conversation is made of, in order: (id of a special token or a text, does the model say it?).

        A leading system message becomes the beginning of the first user message. The content of a user or system
        message is a string or a list of {"type": "text", "text"}; an assistant may also use the types python (a
        calculation) and python_output (its result).
        """
        named = self.convert_tokens_to_ids
        pieces = [(named("<|bos|>"), 0)]
        messages = [(message["role"], message["content"]) for message in messages]
        texts = [[("text", content)] if isinstance(content, str) else self.parts(content) for _, content in messages]
        roles = [role for role, _ in messages]
        if roles[:1] == ["system"]:
            if len(roles) < 2:
                raise ValueError("a system message must be followed by a user message")
            texts[1] = [*texts[0], ("text", "\n\n"), *texts[1]]
            roles, texts = roles[1:], texts[1:]
        for number, (role, parts) in enumerate(zip(roles, texts, strict=True)):
            if role != ("assistant" if number % 2 else "user"):
                raise ValueError("messages must alternate between user and assistant, user first")
            if role == "user":
                if any(kind != "text" for kind, _ in parts):
                    raise ValueError("a user or system message can hold text only")
                whole = "".join(text for _, text in parts)
                pieces += [(named("<|user_start|>"), 0), (whole, 0), (named("<|user_end|>"), 0)]
                continue
            pieces.append((named("<|assistant_start|>"), 0))
            for kind, text in parts:
                if kind == "text":
                    pieces.append((text, 1))
                elif kind == "python":
                    pieces += [(named("<|python_start|>"), 1), (text, 1), (named("<|python_end|>"), 1)]
                else:
                    pieces += [(named("<|output_start|>"), 0), (text, 0), (named("<|output_end|>"), 0)]
            pieces.append((named("<|assistant_end|>"), 1))
        return pieces + [(named("<|assistant_start|>"), 0)] * bool(add_generation_prompt)

    @staticmethod
    def parts(content):
        for part in content:
            if part["type"] not in ("text", "python", "python_output"):
                raise ValueError(f"a part is of type {part['type']!r}; it can be text, python or python_output")
        return [(part["type"], part["text"]) for part in content]

    def conversation_ids(self, messages, add_generation_prompt=False):
        """(ids, mask) of one conversation; the mask is 1 for what the model is to say."""
        pieces = self.conversation_pieces(messages, add_generation_prompt)
        texts = [piece for piece, _ in pieces if isinstance(piece, str)]
        encoded = iter(self(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"])
        ids, mask = [], []
        for piece, said in pieces:
            new = next(encoded) if isinstance(piece, str) else [piece]
            ids += new
            mask += [said] * len(new)
        return ids, mask

    def apply_chat_template(
        self,
        conversation,
        tools=None,
        documents=None,
        chat_template=None,
        add_generation_prompt=False,
        continue_final_message=False,
        tokenize=True,
        padding=False,
        truncation=False,
        max_length=None,
        return_tensors=None,
        return_dict=True,
        return_assistant_tokens_mask=False,
        **kwargs,
    ):
        """As in the library, but each text becomes ids by itself. tokenize=False gives the string of the template.

        truncation cuts off the end. return_assistant_tokens_mask works without padding and tensors.
        """
        if not tokenize:
            rendered = super().apply_chat_template(
                conversation,
                tools=tools,
                documents=documents,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **kwargs,
            )
            one = isinstance(rendered, str)
            return RenderedConversation(rendered) if one else [RenderedConversation(text) for text in rendered]
        if chat_template is not None or tools or documents:
            raise ValueError("tools, documents and other templates need tokenize=False; encode the string that comes")
        if continue_final_message and add_generation_prompt:
            raise ValueError("an answer is either begun or continued: choose one of the two options")
        if not len(conversation):
            raise ValueError("a conversation has at least one message")
        batched = isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")
        conversations = [getattr(chat, "messages", chat) for chat in (conversation if batched else [conversation])]
        rows = [self.conversation_ids(messages, add_generation_prompt) for messages in conversations]
        if continue_final_message:  # without the <|assistant_end|>
            rows = [(ids[:-1], mask[:-1]) for ids, mask in rows]
        if truncation:
            limit = self.model_max_length if max_length is None else max_length
            rows = [(ids[:limit], mask[:limit]) for ids, mask in rows]
        single = not batched and return_tensors is None
        ids = rows[0][0] if single else [ids for ids, _ in rows]
        data = self.pad({"input_ids": ids}, padding=padding, max_length=max_length, return_tensors=return_tensors)
        if return_assistant_tokens_mask:
            if padding or return_tensors is not None:
                raise ValueError("return_assistant_tokens_mask works without padding and tensors")
            data["assistant_masks"] = rows[0][1] if single else [mask for _, mask in rows]
        return data if return_dict else data["input_ids"]
'''
