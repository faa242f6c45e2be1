# %% [markdown]
# ## SmolTalk
#
# Where the model learns to converse: 460 thousand conversations, written by larger models for small ones. They make
# more than half of the fine-tuning mixture; the test split measures how well its style was learned.

# %%
from tasks.common import check_string_messages
from tasks.hub import HubTask

# %% [markdown]
# ### `SmolTalk`
# Used as it is. Some conversations begin with a system message.


# %%
class SmolTalk(HubTask):
    """General conversations to train on; split "train" or "test". Spec section 15.3."""

    repo = "HuggingFaceTB/smol-smoltalk"
    splits = {"default": ("train", "test")}
    row_shape = {"messages": [{"role": str, "content": str}]}

    def __init__(self, split: str, data_dir: str | None = None, **view):
        super().__init__("default", split, data_dir, **view)

    def get_example(self, index: int) -> dict:
        messages = self.rows[index]["messages"]
        try:
            check_string_messages(messages, system_allowed=True)
        except ValueError as error:
            raise self.rows.bad_row(index, str(error)) from None
        return {"messages": messages}
