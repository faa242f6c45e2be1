"""A training of two seconds that one process or several can run: test_golf_train and its subprocesses share it."""

import hashlib
from dataclasses import asdict, replace

import numpy as np
import torch

from golf.golf_gpt import GolfConfig, GolfGPT
from golf.golf_optim import WeightEMA, setup_golf_optimizer
from golf.golf_tokenizers import ByteTables
from golf.golf_train import GolfTraining, train_golf
from golf.looped_gpt import LoopedConfig, LoopedGPT
from golf.recurrent_gpt import RecurrentConfig, RecurrentGPT
from golf.shards import DistributedTokenLoader, TokenStream, load_validation_tokens, write_token_shard
from nanochat.runtime import get_dist_info

V = 61
SHAPE = dict(vocab_size=V, model_dim=32, num_heads=2, num_kv_heads=1, mlp_mult=2, max_seq_len=32)
MODELS = {
    "baseline": (GolfGPT, GolfConfig(**SHAPE, num_layers=2)),
    "recurrent": (RecurrentGPT, RecurrentConfig(**SHAPE, num_unique_layers=1, num_recurrences=2)),
    "looped": (LoopedGPT, LoopedConfig(**SHAPE, num_layers=3, loop_start=1, loop_end=1, num_loops=1, rope_dims=8,
                                       parallel_residual_start=2)),
}  # fmt: skip
TRAINING = GolfTraining(
    iterations=24, warmup_steps=1, warmdown_iters=9, max_wallclock_seconds=0.0, train_batch_tokens=512,
    train_seq_len=32, val_batch_size=1024, val_loss_every=5, train_log_every=1, save_every=4, grad_clip_norm=0.3,
    muon_momentum=0.95, muon_momentum_warmup_start=0.85, muon_momentum_warmup_steps=10, seed=3,
)  # fmt: skip
LEARNING = dict(matrix_lr=0.02, scalar_lr=0.02, tied_embed_lr=0.05, muon_weight_decay=0.05, embed_wd=0.01)
EMA_OPTIONS = dict(decay=0.9, start_fraction=0.25)  # 18 of 24 steps are left then, so it is lowered to 1 − 10/18


def write_tiny_shards(folder):
    """Two training shards, shorter than the run, and one for validation: skewed tokens, so that there is something
    to learn."""
    folder.mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(0)
    for name, count in (("train_000000", 4000), ("train_000001", 3001), ("val_000000", 333)):
        write_token_shard(folder / f"fineweb_{name}.bin", (V * draws.random(count) ** 3).astype(np.int64))
    return folder


def byte_tables() -> ByteTables:
    ids = torch.arange(V)
    return ByteTables((1 + ids % 5).to(torch.int16), ids % 3 == 0, ids < 2)


class TinyRun:
    """The parts of a run; `records` iterates over `train_golf`."""

    def __init__(self, data, kind="recurrent", training=TRAINING, **changes):
        self.training = replace(training, **changes)
        _, self.rank, _, self.world_size = get_dist_info()
        torch.manual_seed(self.training.seed)
        make, self.config = MODELS[kind]
        self.model = make(self.config)
        with torch.no_grad():  # a new model has no gradient where its projections are zero
            for p in self.model.parameters():
                p.add_(0.02 * torch.randn(p.shape))
        self.optimizer = setup_golf_optimizer(self.model, compute_dtype=torch.float32, **LEARNING)
        self.ema = WeightEMA(self.model, **EMA_OPTIONS)
        self.call = self.model
        self.stream = TokenStream(sorted(data.glob("fineweb_train_*.bin")), V)
        self.val_tokens = load_validation_tokens(sorted(data.glob("fineweb_val_*.bin")), V)

    def records(self, folder, inputs=None, **options):
        loader = DistributedTokenLoader(self.stream, self.rank, self.world_size)
        inputs = {"model": asdict(self.config), "learning": LEARNING} | (inputs or {})
        return train_golf(
            folder, self.training, self.model, self.optimizer, self.call, loader, self.val_tokens, byte_tables(),
            inputs, self.ema, **options,
        )  # fmt: skip


def checksum(state: dict[str, torch.Tensor]) -> str:
    """Sixteen digits that change with any bit of any tensor."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class StepTime:
    """Seconds that pass when the optimizer steps, and many when something is scored."""

    def __init__(self, run, per_step=1.0, per_scoring=100.0):
        self.seconds, self.steps = 0.0, 0
        step, model = run.optimizer.step, run.model

        def timed_step():
            step()
            self.seconds += per_step
            self.steps += 1

        def call(*arguments, **options):
            self.seconds += 0.0 if torch.is_grad_enabled() else per_scoring
            return model(*arguments, **options)

        run.optimizer.step, run.call = timed_step, call

    def __call__(self):
        return self.seconds
