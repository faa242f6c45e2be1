"""The published record "Training Opt Seq4096 v1", rebuilt from its facts: sizes, log values, JSON and claims."""

import json
import math
from pathlib import Path

BASELINE = {
    "DATA_PATH": "./data/datasets/fineweb10B_sp1024", "SEED": "1337", "ITERATIONS": "20000", "WARMUP_STEPS": "20",
    "MAX_WALLCLOCK_SECONDS": "600.0", "TRAIN_SEQ_LEN": "1024", "TRAIN_BATCH_TOKENS": "524288", "WARMDOWN_ITERS": "800",
    "MATRIX_LR": "0.04", "SCALAR_LR": "0.04", "TIED_EMBED_LR": "0.05", "MUON_MOMENTUM": "0.95",
    "MUON_MOMENTUM_WARMUP_START": "0.85", "MUON_MOMENTUM_WARMUP_STEPS": "500", "VAL_LOSS_EVERY": "20000",
    "ADAM_EPS": "1e-8",
}  # fmt: skip
CHANGES = {
    "TRAIN_SEQ_LEN": "4096", "TRAIN_BATCH_TOKENS": "393216", "WARMDOWN_ITERS": "3000", "MATRIX_LR": "0.020",
    "SCALAR_LR": "0.020", "TIED_EMBED_LR": "0.030", "MUON_MOMENTUM": "0.99", "MUON_MOMENTUM_WARMUP_START": "0.92",
    "MUON_MOMENTUM_WARMUP_STEPS": "1500", "VAL_LOSS_EVERY": "1000",
}  # fmt: skip
# seed: steps, ms per step, total ms, nats and bits per byte before, after quantisation (exact), model bytes
RUNS = {
    1337: (8394, "71.47", 599921, "2.0227", "1.1980", "2.02857127", "1.20143417", 15_820_684),
    1338: (9092, "65.98", 599903, "2.0193", "1.1959", "2.02522281", "1.19945102", 15_835_395),
    1339: (8508, "70.51", 599906, "2.0255", "1.1996", "2.03154449", "1.20319508", 15_839_491),
}
BEFORE = [("2.03588345", "1.20576485"), ("2.03657529", "1.20617460"), ("2.03823779", "1.20715923")]


def script_of(settings: dict, size: int) -> str:
    """A script that reads these settings and has exactly `size` bytes."""
    lines = ["import os", "import numpy as np", "", "class Hyperparameters:"]
    lines += [f"    {name.lower()} = os.environ.get({name!r}, {value!r})" for name, value in settings.items()]
    lines += ["", "def main():", "    print(np.zeros(1))", "", 'if __name__ == "__main__":', "    main()", ""]
    text = "\n".join(lines)
    return text + "#" * (size - len(text) - 1) + "\n"


def log_of(script: str, seed: int, settings: dict, code_bytes: int) -> str:
    steps, average, ms, nats, bpb, exact_nats, exact_bpb, model = RUNS[seed]
    first = f"step:1000/20000 val_loss:2.3005 val_bpb:{2.3005 / math.log(2) / 2.43593:.4f} train_time:70000ms"
    return "\n".join([
        script, "=" * 100, "Running Python 3.11.10", "Running PyTorch 2.8.0+cu128", "| NVIDIA-SMI 570 |", "=" * 100,
        "val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=./data/tokenizers/fineweb_1024_bpe.model",
        "train_loader:dataset:fineweb10B_sp1024 train_shards:80",
        "val_loader:shards pattern=./data/datasets/fineweb10B_sp1024/fineweb_val_*.bin tokens:62021632",
        "model_params:17059912", "world_size:8 grad_accum_steps:1", "attention_mode:gqa num_heads:8 num_kv_heads:4",
        f"tie_embeddings:True embed_lr:{settings['TIED_EMBED_LR']} head_lr:0.0 "
        f"matrix_lr:{float(settings['MATRIX_LR'])} scalar_lr:{float(settings['SCALAR_LR'])}",
        f"train_batch_tokens:{settings['TRAIN_BATCH_TOKENS']} train_seq_len:{settings['TRAIN_SEQ_LEN']} "
        "iterations:20000 warmup_steps:20 max_wallclock_seconds:600.000",
        f"seed:{seed}", "warmup_step:20/20", first,
        f"step:{steps}/20000 val_loss:{nats} val_bpb:{bpb} train_time:{ms}ms step_avg:{average}ms",
        f"stopping_early: wallclock_cap train_time:{ms}ms step:{steps}/20000",
        "peak memory allocated: 7748 MiB reserved: 8070 MiB", "Serialized model: 67224983 bytes",
        f"Code size: {code_bytes} bytes", f"Total submission size: {67224983 + code_bytes} bytes",
        f"Serialized model int8+zlib: {model} bytes (payload:17178912 raw_torch:17224025 payload_ratio:3.91x)",
        f"Total submission size int8+zlib: {model + code_bytes} bytes",
        f"final_int8_zlib_roundtrip val_loss:{float(exact_nats):.4f} val_bpb:{float(exact_bpb):.4f} eval_time:2106ms",
        f"final_int8_zlib_roundtrip_exact val_loss:{exact_nats} val_bpb:{exact_bpb}", "",
    ])  # fmt: skip


README = """\
This record submission is called `Training Opt Seq4096 v1`.

- Sequence length: `TRAIN_SEQ_LEN=4096`
- Batching: `TRAIN_BATCH_TOKENS=393216` (3/4 batch)
- Muon: `MUON_MOMENTUM=0.99 MUON_MOMENTUM_WARMUP_STEPS=1500 MUON_MOMENTUM_WARMUP_START=0.92`
- Schedule: `WARMDOWN_ITERS=3000`

Key metrics:
- Timed training stopped at `8394/20000` steps due to the wallclock cap.
- Pre-quant eval at stop: `val_loss:2.0227`, `val_bpb:1.1980`
- Post-quant roundtrip eval: `val_loss:2.0286`, `val_bpb:1.2014`
- Exact printed metric: `final_int8_zlib_roundtrip_exact val_bpb:1.20143417`
- Train time: `599921ms` (`step_avg:71.47ms`)
- Serialized model int8+zlib: `15820684 bytes`
- Code size for this standalone record script: `47759 bytes`
- Total submission size int8+zlib: `15868326 bytes`

Each step costs ~71ms/step (vs ~43ms at seq_len=1024).
A **0.023 BPB improvement** over the naive baseline (1.2014 vs 1.2244), and 0.015 over
Long Context Seq2048 v2 at 1.2162.

- The current SOTA is `Long Context Seq2048 v2` at `1.21613611`.
- The challenge requires beating `1.21113611` (SOTA - 0.005) at p < 0.01.
  - `SEED=1337`: `1.20143417`
  - `SEED=1338`: `1.19945102`
  - `SEED=1339`: `1.20319508`
- Sample mean across the three runs: `1.20136009`
- Sample standard deviation: `0.00187`
- One-sided one-sample t-test against `1.21113611`: `t=9.06` with `df=2`, which gives `p=0.006`
"""


def write_published_record(root) -> Path:
    folder = Path(root) / "records" / "track_10min_16mb" / "2026-03-19_TrainingOptSeq4096"
    folder.mkdir(parents=True)
    ran, shipped = script_of(BASELINE, 47_642), script_of(BASELINE | CHANGES, 47_759)
    settings = BASELINE | CHANGES
    (folder / "train_gpt.py").write_text(shipped)
    (folder / "README.md").write_text(README)
    (folder / "train.log").write_text(log_of(ran, 1337, settings, 47_642))
    for seed in (1338, 1339):
        (folder / f"train_seed{seed}.log").write_text(log_of(shipped, seed, settings, 47_759))
    claims = {
        "author": "Spokane Way", "github_id": "spokane-way", "name": "Training Opt Seq4096 v1", "blurb": "longer",
        "date": "2026-03-19T04:50:00Z", "val_loss": 2.02857127, "val_bpb": 1.20143417, "bytes_total": 15868326,
        "bytes_code": 47759,
    }  # fmt: skip
    (folder / "submission.json").write_text(json.dumps(claims, indent=2))
    return folder
