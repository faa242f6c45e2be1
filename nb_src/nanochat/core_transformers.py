# %% [markdown]
# ## CORE for other people's models
#
# A score means little alone. Any causal language model of the `transformers` library can sit the same exam, GPT-2 for
# one, whose scores are published. The library is needed for this chapter only, and imported when it is used.

# %%
import inspect

from nanochat.runtime import UserError

# %% [markdown]
# ### `TransformersModel`
# The two things that CORE asks of a model: how much it can read, and the logits at a few positions. Most models can
# leave out the others themselves (`logits_to_keep`); for the rest the batch is cut so that all logits fit.

# %%
FOREIGN_LOGITS_BYTES = 1 << 30  # of fp32 logits alive at once
FOREIGN_LENGTH_NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")


class TransformersModel:
    """A causal language model of the `transformers` library for `evaluate_core`. Spec section 13.7.

    model: called with input_ids=(B, T) it gives an object with .logits (B, T, V); its .config says how much it can
    read (GPT-2: 1024). max_seq_len: in place of that; longer prompts lose their beginning.
    """

    def __init__(self, model, max_seq_len: int | None = None):
        self.model = model
        config = getattr(model.config, "get_text_config", lambda: model.config)()
        found = (getattr(config, name, None) for name in FOREIGN_LENGTH_NAMES)
        self.max_seq_len = max_seq_len or next((n for n in found if n), None)
        if self.max_seq_len is None:
            raise UserError(
                f"the config of {type(model).__name__} does not say how many tokens it can read. Set max_seq_len."
            )
        self.vocab_size = config.vocab_size
        parameters = inspect.signature(model.forward).parameters
        self.keeps_some = "logits_to_keep" in parameters
        self.options = {"use_cache": False} if "use_cache" in parameters else {}
        self.training = model.training

    def eval(self) -> "TransformersModel":
        return self.train(False)

    def train(self, mode: bool = True) -> "TransformersModel":
        self.model.train(mode)
        self.training = mode
        return self

    def __call__(self, ids):  # (B, T) int64 -> (B, T, V) fp32
        """All logits."""
        return self.model(input_ids=ids, **self.options).logits.float()

    def logits_at(self, ids, rows, columns):  # ids (B, T); rows and columns (n,), rows ascending
        """Yield the logits of the positions (rows[i], columns[i]) in order, (m, V) fp32 at a time."""
        if not len(rows):
            return
        kept = ids.size(1) - int(columns.min()) if self.keeps_some else ids.size(1)  # the last ones of each row
        skipped = ids.size(1) - kept
        options = self.options | ({"logits_to_keep": kept} if self.keeps_some else {})
        rows_at_once = max(1, FOREIGN_LOGITS_BYTES // (4 * self.vocab_size * kept))
        for first in range(0, len(ids), rows_at_once):
            here = (rows >= first) & (rows < first + rows_at_once)
            if here.any():
                logits = self.model(input_ids=ids[first : first + rows_at_once], **options).logits
                yield logits[rows[here] - first, columns[here] - skipped].float()


# %% [markdown]
# ### `TransformersTokenizer`
# Its tokenizer, with the two methods that CORE needs. A text begins with the model's own beginning-of-text token, or
# where it has none with its end-of-text token, which did that service in GPT-2.


# %%
class TransformersTokenizer:
    """A tokenizer of the `transformers` library, called as ours is."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, getattr(tokenizer, "cls_token_id", None))
        self.bos_token_id = next((token_id for token_id in ids if token_id is not None), None)
        if self.bos_token_id is None:
            raise UserError("this tokenizer has no token to begin a text with (bos, eos or cls), which CORE needs.")

    def get_bos_token_id(self) -> int:
        return self.bos_token_id

    def encode(self, text, prepend: int | None = None) -> list:
        """Token ids of a string, or of a list of strings."""
        if isinstance(text, str):
            return self.encode([text], prepend)[0]
        encoded = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [([] if prepend is None else [prepend]) + list(ids) for ids in encoded]


# %% [markdown]
# ### `load_transformers_model`


# %%
def load_transformers_model(hf_path: str, device, max_seq_len: int | None = None):
    """(TransformersModel, TransformersTokenizer) for a model on the Hugging Face hub or in a folder.

    Weights are read from safetensors alone, and no code that comes with a model is run. Raises UserError when the
    library is not installed or the model cannot be loaded.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise UserError(
            "evaluating a model of the transformers library needs that library: pip install transformers"
        ) from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(hf_path)
        model = AutoModelForCausalLM.from_pretrained(hf_path, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{hf_path} cannot be loaded as a causal language model ({error}).") from None
    return TransformersModel(model.to(device).eval(), max_seq_len), TransformersTokenizer(tokenizer)
