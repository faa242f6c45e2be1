"""What this GPU makes of the model: kernels, precisions, memory, first steps, exams and generation, in one table.

    python benchmarks/gpu.py [-o out/gpu.md] [--tests] [--data FOLDER] [--minutes 9] [--tiny]

The d12 run of 2048 tokens, windows SSSL and 524,288 tokens in a step, on synthetic tokens or on a folder of parquet
files. Each row is measured in a process of its own, so that one kernel that crashes or hangs costs one row; when the
minutes are spent the rest is left out, and the table says what. Tracebacks go to a file beside the table. MFU counts 6
FLOPs for each multiplied weight and attention without a discount for causality, over the data sheet's dense bf16 peak.
The reference in the same run is the same model compiled as a whole over PyTorch's attention with masks and all logits
at once. --tests runs the tests that need a GPU as well, within the same minutes. --tiny tries the script on a CPU.

On synthetic tokens PyTorch and numpy are enough; the package `kernels` adds the kernels of the hub.
"""
# ruff: noqa: E402 - what a chapter imports may have to be stood in for

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.error
import urllib.request
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "nb_src"))


class StandIns:
    """Lets chapters be imported on a machine that lacks what they need to read text and to talk to the hub."""

    packages = ("huggingface_hub", "pyarrow", "requests", "rustbpe", "safetensors", "tiktoken", "tokenizers", "tqdm",
                "yaml")  # fmt: skip

    def find_spec(self, name, path=None, target=None):  # asked last, for what nobody else has found
        if name.partition(".")[0] in self.packages:
            return importlib.util.spec_from_loader(name, self, is_package=True)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        def any_name(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (Exception,), {})

        module.__getattr__ = any_name


stand_ins = StandIns()
sys.meta_path.append(stand_ins)

from nanochat.attention import AttentionBackend, band_mask, flash_attn, sdpa_with_kvcache
from nanochat.attention_selection import attention_order, select_attention, short_reason, this_machine
from nanochat.base_train import build_for_training, prepare_for_training, training_step
from nanochat.core_eval import ScoredSequence, score_questions
from nanochat.dataloader import tokenizing_distributed_data_loader_with_state_bos_bestfit
from nanochat.dataset import prepare_corpus
from nanochat.device_batch import fitting_device_batch
from nanochat.engine import Engine
from nanochat.planning import PretrainSettings, TrainingOptions, plan_pretraining
from nanochat.precision import LossScaler
from nanochat.runtime import (
    UserError,
    autodetect_device_type,
    choose_compute_dtype,
    compute_init,
    device_name_of,
    get_base_dir,
    get_peak_flops,
    print0,
)
from nanochat.settings import PRESETS
from nanochat.tokenizer import get_tokenizer, train_tokenizer
from nanochat.training_loop import synchronize

sys.meta_path.remove(stand_ins)
NOT_INSTALLED = [name for name in StandIns.packages if getattr(sys.modules.get(name), "__loader__", None) is stand_ins]
for name in [name for name in sys.modules if name.partition(".")[0] in NOT_INSTALLED]:
    del sys.modules[name]  # whoever asks for it from now on must learn that it is missing

MEASURED_SECONDS = 12.0  # of steps for each row, three of them at least
TEST_SECONDS = 150.0  # kept for the tests
ROW_SHARE = 0.4  # of the minutes, at most, for one row


# The model of a row, and its batches.


def plan_of(case: dict):
    """The plan of the d12 run (or of a tiny one) at the depth and device batch of a row, with the batch of d12."""
    values = PRESETS["cpu"] | dict(window_pattern="SSSL") if case["tiny"] else PRESETS["a100"]
    values = values | dict(total_batch_size=8192 if case["tiny"] else 2**19)
    values = values | dict(depth=case["depth"], device_batch_size=case["batch"], num_iterations=1000, model_tag="")
    return plan_pretraining(
        PretrainSettings(**{name: values[name] for name in PretrainSettings.__dataclass_fields__}),
        values["vocab_size"],
    )


def batches_of(case: dict, plan, B: int, device):
    """Endless (inputs, targets) of B sequences."""
    T, V = plan.settings.max_seq_len, plan.model_config.vocab_size
    if case["data"]:
        corpus = prepare_corpus(case["data"])
        loader = tokenizing_distributed_data_loader_with_state_bos_bestfit(
            get_tokenizer(), B, T, "train", device=device, corpus=corpus
        )
        for inputs, targets, _ in loader:
            yield inputs, targets
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, V, (B, T + 1), generator=generator).to(device)
    while True:
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def masked_attention(q, k, v, window_size):
    """What one writes first: PyTorch's attention, with a mask where there is a window."""
    T, left = q.size(1), window_size[0]
    mask = None
    if 0 <= left < T - 1:
        positions = torch.arange(T, device=q.device)
        mask = band_mask(positions, positions, left)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.size(1) != k.size(1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)
    return y.transpose(1, 2)


def plain_loss(model, inputs, targets):
    """All logits at once, in fp32."""
    logits = model.lm_head(model.trunk(inputs)).float()
    logits = model.config.logit_softcap * torch.tanh(logits / model.config.logit_softcap)
    return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


class PlainModel:
    """The model with that loss, compiled as a whole."""

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def compile(self) -> None:
        torch.compiler.reset()
        self.loss = torch.compile(lambda inputs, targets: plain_loss(self.model, inputs, targets), dynamic=False)

    def __call__(self, inputs, targets):
        return self.loss(inputs, targets)


# The rows. Each answers with a dict, in a process of its own.


def train(case: dict, device) -> dict:
    """Whole optimizer steps: the first one, the median of the others, the most memory that was allocated."""
    dtype = getattr(torch, case["dtype"]) if case["dtype"] else choose_compute_dtype(device.type)[0]
    plan = plan_of(case)
    started = time.perf_counter()
    name, sentence = "", "PyTorch's, with masks"
    if case["plain"]:
        flash_attn.use(AttentionBackend("plain", masked_attention, sdpa_with_kvcache))
    else:
        choice = select_attention(device, dtype, case["attention"], compiled=True)
        name, sentence = choice.name, choice.sentence
    model = build_for_training(plan, device, dtype)
    optimizer, B, T = model.setup_optimizer(), case["batch"], plan.settings.max_seq_len
    sequences = plan.total_batch_size // T
    if case["plain"]:
        model = PlainModel(model)

        def prepare(size):
            model.compile()
            optimizer.compile()

        B = fitting_device_batch(model, optimizer, B, T, sequences, prepare)
    else:
        options = TrainingOptions(recompute=case["recompute"], fp8=case["fp8"])
        B = prepare_for_training(model, optimizer, B, T, sequences, options)
    scaler, source = LossScaler(dtype), batches_of(case, plan, B, device)

    def step():
        passes = sequences // B
        micro_batches = ((*next(source), 1 / passes) for _ in range(passes))
        training_step(model, optimizer, scaler, micro_batches)
        synchronize(device)

    step()
    first = time.perf_counter() - started
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    while sum(seconds) < (1 if case["tiny"] else MEASURED_SECONDS) or len(seconds) < 3:
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    step_seconds = statistics.median(seconds)
    rate = plan.total_batch_size / step_seconds
    peak = get_peak_flops(device_name_of(device))
    result = {
        "kernel": sentence, "first step s": first, "step ms": 1000 * step_seconds, "tokens/s": rate,
        "MFU": plan.flops_per_token * rate / peak if peak < float("inf") else None,
        "peak GiB": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        "device batch": B, "candidate": name,
    }  # fmt: skip
    if case["profile"]:
        try:
            result["profile"] = profile_of(step, device)
        except Exception as error:  # the numbers above are worth more
            traceback.print_exc()
            result["profile"] = [(f"no profile: {short_reason(error)}", 0.0, 0.0)]
    return result


def profile_of(step, device) -> list:
    """(what, share of the step, ms in a step) of the kernels that take the most, in one step, and of all together."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] * (device.type == "cuda")
    with torch.profiler.profile(activities=activities) as recorded:
        started = time.perf_counter()
        step()
        step_us = 1e6 * (time.perf_counter() - started)
    times = {}
    for event in recorded.key_averages():
        if device.type != "cuda":
            times[event.key] = event.self_cpu_time_total
        elif event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            times[event.key] = event.self_device_time_total  # an annotation spans kernels, which would count twice
    largest = sorted(times.items(), key=lambda item: -item[1])[:18]
    rows = [("all kernels; the device idles for the rest", sum(times.values()))] + largest
    return [(name[:90].replace("|", "/").replace("`", "'"), us / step_us, us / 1000) for name, us in rows]


def evaluation_model(case: dict, device):
    """A model of the run's shape as `load_model` gives it, with random weights."""
    dtype = choose_compute_dtype(device.type)[0]
    sentence = select_attention(device, dtype, case["attention"]).sentence
    model = build_for_training(plan_of(case), device, dtype)
    for parameter in model.parameters():
        if parameter.dim() == 2:  # with the starting weights every next token would be the same
            parameter.data.normal_(std=0.05)
    return model.to(dtype).eval(), sentence


class AnyTokenizer:
    """The special tokens that the engine asks for, at the end of the vocabulary."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def get_bos_token_id(self):
        return self.vocab_size - 9

    def encode_special(self, name):
        return self.vocab_size - 1 - len(name) % 8

    def decode(self, ids):  # asked when the dice wrote something for the calculator, which makes nothing of it
        return ""


def generate(case: dict, device) -> dict:
    """New tokens per second for one text at a time and for many, prompts of 128 tokens read along."""
    model, sentence = evaluation_model(case, device)
    V, (prompt, new) = model.config.vocab_size, (16, 8) if case["tiny"] else (128, 128)
    engine = Engine(model, AnyTokenizer(V))
    generator = torch.Generator().manual_seed(0)
    result = {"kernel": sentence}
    for rows in (1, 32, 128):
        prompts = torch.randint(0, V - 9, (rows, prompt), generator=generator).tolist()
        speeds = []
        for _ in range(3):
            started = time.perf_counter()
            answers = list(engine.generate_many(prompts, new, temperature=1.0, batch_size=rows))
            synchronize(device)
            speeds.append(sum(len(tokens) for _, tokens in answers) / (time.perf_counter() - started))
        result[f"{rows} at a time, tokens/s"] = statistics.median(speeds)
    return result


def core(case: dict, device) -> dict:
    """Questions per second in the two shapes that CORE mostly has."""
    model, sentence = evaluation_model(case, device)
    V, scale = model.config.vocab_size, 0.05 if case["tiny"] else 1
    generator = torch.Generator().manual_seed(0)

    def tokens(n):
        return torch.randint(0, V - 9, (max(2, round(n * scale)),), generator=generator).tolist()

    def ten_shot():
        examples = tokens(700)
        endings = [tokens(12) for _ in range(4)]
        return [ScoredSequence(examples + ending, len(examples), len(examples + ending)) for ending in endings]

    def continuation():
        text = tokens(90)
        return [ScoredSequence(text, len(text) - 1, len(text))]

    result = {"kernel": sentence}
    for name, make, by_loss in (("10-shot, 4 answers", ten_shot, True), ("0-shot, last word", continuation, False)):
        questions = [make() for _ in range(16 if case["tiny"] else 512)]
        list(score_questions(model, questions[:8], by_loss, device))
        synchronize(device)
        started = time.perf_counter()
        list(score_questions(model, questions, by_loss, device))
        synchronize(device)
        result[f"{name}, questions/s"] = len(questions) / (time.perf_counter() - started)
    return result


def select(case: dict, device) -> dict:
    """The choice of the attention kernel alone, so that no other row has to wait for a download."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] += "_of_selection"  # the next row is to find an empty one
    started = time.perf_counter()
    choice = select_attention(device, choose_compute_dtype(device.type)[0], compiled=True)
    return {"chosen": choice.sentence, "seconds": time.perf_counter() - started}


KINDS = {"train": train, "generate": generate, "core": core, "select": select}


# The list of rows, and the table.


def case_of(name: str, kind: str = "train", **changes) -> dict:
    defaults = dict(
        depth=12, batch=16, attention="auto", dtype="", fp8=False, recompute=False, plain=False, profile=False
    )
    return {"name": name, "kind": kind} | defaults | changes


FROM_THE_CACHE = "d12, kernels from the cache"


def cases_for(device) -> list[dict]:
    """Every row, the most telling first."""
    others = attention_order(this_machine(device))
    rows = [
        case_of("attention", "select"),
        case_of("d12, kernels not compiled yet", profile=True),
        case_of(FROM_THE_CACHE),
        case_of("d12, plain model compiled whole", plain=True),
        case_of("d12 generation", "generate"),
        case_of("d12 CORE", "core"),
        case_of("d12, device batch 32", batch=32),
        case_of("d20, device batch 16", depth=20),
        *(case_of(f"d12, {name}", attention=name) for name in others),
        case_of("d12, fp16", dtype="float16"),
        case_of("d12, recompute", recompute=True),
    ]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        rows += [case_of("d12, fp8", fp8=True), case_of("d20, fp8", depth=20, fp8=True)]
    return [*rows, case_of("d12, fp32", dtype="float32"), case_of("d26, device batch 8", depth=26, batch=8)]


def run_case(case: dict, timeout: float, log: Path | None = None) -> dict:
    """The answer of a process of its own, or {"error": one line}; what it said then goes to the log."""
    command = [sys.executable, str(Path(__file__).resolve()), "--case", json.dumps(case)]
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        status, said_last = run_within(command, timeout, said)
        answers = [line for line in said_last if line.startswith(ANSWER)]  # it may crash after it has answered
        if answers:
            result = json.loads(answers[-1].removeprefix(ANSWER))
        elif status is None:
            result = {"error": f"stopped after {timeout:.0f} s"}
        else:
            result = {"error": f"exit status {status}: {(said_last or ['no word'])[-1][:200]}"}
        if "error" in result:
            said.seek(0)
            text = f"===== {case['name']}: {result['error']}\n{said.read()}\n"
            if log is None:
                print(text[-3000:], file=sys.stderr)
            else:
                with open(log, "a") as file:
                    file.write(text)
        return result


ANSWER = "ANSWER "


def run_within(command: list[str], timeout: float, output) -> tuple[int | None, list[str]]:
    """(exit status, or None if it took too long; the lines that it wrote). Whatever it started ends with it."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    status = None
    try:
        status = process.wait(timeout)
    except subprocess.TimeoutExpired:
        pass
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # and the compiler's workers
            process.wait(30)
        except (ProcessLookupError, subprocess.TimeoutExpired):  # a driver may hang and keep it: let it be
            pass
    output.seek(0)
    return status, [line.strip() for line in output.read().splitlines() if line.strip()]


def run_tests(timeout: float) -> tuple[bool, str]:
    """(whether none failed, Markdown) of the tests that need a GPU."""
    heading = "\nTests that need a GPU: "
    if importlib.util.find_spec("pytest") is None:
        return True, f"{heading}not run, pytest is not installed.\n"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-vv", "-rsfE", "--tb=short", "-p", "no:cacheprovider"]
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        status, lines = run_within(command, timeout, output)
    summary = f"stopped after {timeout:.0f} s" if status is None else lines[-1] if lines else f"exit status {status}"
    details = "\n".join(line[:300] for line in lines[-80:])
    return status == 0, f"{heading}{summary.strip('= ')}.\n\n```\n{details}\n```\n"


def hub_answers() -> bool:
    """Whether the hub can be reached, so that no row has to wait for it when it cannot."""
    try:
        urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


def machine_and_versions(device) -> str:
    """One line: device, its memory, power limit and driver, and the versions of what computes."""
    parts = [device_name_of(device)]
    if device.type == "cuda":
        parts[0] += f" {torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB"
        query = ["nvidia-smi", "--query-gpu=power.limit,driver_version", "--format=csv,noheader"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
            parts.append(f"power limit and driver {answer.stdout.splitlines()[0]}")
        except (OSError, subprocess.SubprocessError, IndexError):
            pass
        parts.append(f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    parts.append(f"torch {torch.__version__}, Python {platform.python_version()}")
    for package in ("triton", "kernels", "flash-attn-4"):
        try:
            parts.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            pass
    return ", ".join([*parts, time.strftime("%Y-%m-%d")])


def show(value) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"


def table_of(results: list[tuple[dict, dict]], title: str, left_out: list[str]) -> str:
    """Everything so far as Markdown."""
    reference = next((result["tokens/s"] for case, result in results if case["plain"] and "tokens/s" in result), None)
    lines = [f"## {title}", ""]
    lines += [
        "| training | device batch | step ms | tokens/s | × plain | MFU | peak GiB | first step s | attention |",
        "|" + " --- |" * 9,
    ]
    for case, result in results:
        if case["kind"] != "train":
            continue
        if "error" in result:
            lines.append(f"| {case['name']} | {result['error'].replace('|', '/')} |" + " |" * 7)
            continue
        ratio = show(result["tokens/s"] / reference) if reference and case["depth"] == 12 else "–"
        numbers = [
            str(result["device batch"]),
            show(result["step ms"]),
            show(result["tokens/s"]),
            ratio,
            "–" if result["MFU"] is None else f"{result['MFU']:.1%}",
        ]
        numbers += [show(result["peak GiB"]), show(result["first step s"]), result["kernel"]]
        lines.append(f"| {case['name']} | " + " | ".join(numbers) + " |")
    for case, result in results:
        if case["kind"] != "train":
            facts = "; ".join(
                f"{name} {value if isinstance(value, str) else show(value)}" for name, value in result.items()
            )
            lines += ["", f"{case['name']}: {facts}."]
        elif "profile" in result:
            lines += [
                "",
                f"Where the time of a step goes ({case['name']}):",
                "",
                "| kernel | share | ms |",
                "| --- | --- | --- |",
            ]
            lines += [f"| `{name}` | {share:.1%} | {ms:,.1f} |" for name, share, ms in result["profile"]]
    if left_out:
        lines += ["", "Left out, because the time was spent: " + ", ".join(left_out) + "."]
    return "\n".join(lines) + "\n"


def measure_all(given) -> bool:
    """Measure, print and write; whether there is a number and no test failed."""
    deadline = time.monotonic() + 60 * given.minutes
    device = torch.device(autodetect_device_type())
    if device.type != "cuda" and not given.tiny:
        raise SystemExit("This needs an NVIDIA GPU; --tiny tries the script without one.")
    if given.data and NOT_INSTALLED:
        raise SystemExit(f"--data needs packages that are not installed: {', '.join(NOT_INSTALLED)}.")
    title, log, results, left_out, measured = machine_and_versions(device), None, [], [], set()
    print0(title, flush=True)
    if given.output:
        log = Path(given.output).with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)

    def write(more: str = "") -> str:
        text = table_of(results, title, left_out) + more
        if given.output:
            Path(given.output).write_text(text)
        return text

    try:  # kernels that lie in the usual place are used, and stay there for the notebook
        os.environ.setdefault("KERNELS_CACHE", os.path.join(get_base_dir(), "kernels"))
    except UserError as error:
        print0(f"kernels of the hub are not kept: {error}")
    if device.type == "cuda" and not hub_answers():
        os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as base:  # empty caches: the first row is a cold start
        os.environ["NANOCHAT_BASE_DIR"] = base
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(base, "compile_cache"))
        os.environ.pop("TRITON_CACHE_DIR", None)
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the notebook does
        if given.data:
            given.data = str(Path(given.data).resolve())
            corpus = prepare_corpus(given.data)
            vocab_size = PRESETS["cpu" if given.tiny else "a100"]["vocab_size"]
            train_tokenizer(corpus.train_files, corpus.text_column, vocab_size, 20_000_000).save(
                Path(base, "tokenizer")
            )
        for case in cases_for(device):
            if given.only and given.only not in case["name"]:
                continue
            if case["attention"] in measured:  # as the choice of auto
                continue
            if given.tiny:
                case |= dict(depth=2, batch=4)
            seconds = deadline - time.monotonic() - (TEST_SECONDS if given.tests else 0)
            if seconds < 20:
                left_out.append(case["name"])
                continue
            seconds = min(seconds, ROW_SHARE * 60 * given.minutes)
            result = run_case(case | {"tiny": given.tiny, "data": given.data}, seconds, log)
            results.append((case, result))
            if case["name"] == FROM_THE_CACHE:
                measured.add(result.get("candidate"))
            print0(f"{case['name']}: {json.dumps({k: v for k, v in result.items() if k != 'profile'})}", flush=True)
            write()
        passed, tests = run_tests(max(30.0, deadline - time.monotonic())) if given.tests else (True, "")
    print(f"\n{write(tests)}")
    return passed and any("error" not in result for _, result in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", default="", help="a Markdown file, written after each row")
    parser.add_argument("--tests", action="store_true", help="also run the tests that need a GPU, with pytest")
    parser.add_argument("--data", default="", help="a folder of parquet files instead of synthetic tokens")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.case:
        sys.exit(0 if measure_all(given) else 1)
    case = json.loads(given.case)
    try:
        device = compute_init(autodetect_device_type())[-1]
        answer = KINDS[case["kind"]](case, device)
    except Exception as error:
        traceback.print_exc()
        answer = {"error": str(error) if isinstance(error, UserError) else short_reason(error)}
    print(f"{ANSWER}{json.dumps(answer)}", flush=True)


if __name__ == "__main__":
    main()
