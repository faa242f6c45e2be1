# %% [markdown]
# ## HumanEval
#
# 164 small Python functions to be written from their signature and docstring. The only honest judgement is to run what
# the model wrote against the tests, and that happens in the sandbox.

# %%
import re

from nanochat.execution import check_solution
from tasks.hub import HubTask

# %% [markdown]
# ### From an answer to a program
# A chat model wraps its code in prose and a code block, and it need not repeat the imports of the question.

# %%
CODE_BLOCK = re.compile(r"```(?:python)?\s*\n(.*?)\n```", re.DOTALL)


def extract_code(completion: str) -> str:
    """The content of the first code block, or all of the completion when there is none."""
    match = CODE_BLOCK.search(completion)
    return (match[1] if match else completion).strip()


def leading_imports(prompt: str) -> str:
    """The import lines at the top of a prompt, between blank lines and comments."""
    imports = []
    for line in map(str.strip, prompt.split("\n")):
        if line.startswith(("import ", "from ")):
            imports.append(line)
        elif line and not line.startswith("#"):
            break
    return "\n".join(imports)


# %% [markdown]
# ### `HumanEval`
# What the model wrote and what it is checked with go to the sandbox apart, so that the one cannot touch the other.


# %%
class HumanEval(HubTask):
    """Python functions to write; each conversation also has "entry_point" and "test". Spec section 15.3.

    allow_weak: run the answers even where the sandbox cannot lock them in, see `check_solution`.
    """

    repo = "openai/openai_humaneval"
    splits = {"openai_humaneval": ("test",)}
    row_shape = {"prompt": str, "canonical_solution": str, "entry_point": str, "test": str}

    def __init__(self, data_dir: str | None = None, allow_weak: bool = False, **view):
        super().__init__("openai_humaneval", "test", data_dir, **view)
        self.allow_weak = allow_weak

    def get_example(self, index: int) -> dict:
        row = self.rows[index]
        return {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": f"{row['prompt']}\n{row['canonical_solution']}"},
            ],
            "entry_point": row["entry_point"],
            "test": row["test"],
        }

    def evaluate(self, conversation: dict, completion: str) -> int:
        prompt, test = conversation["messages"][0]["content"], conversation["test"]
        program = f"{leading_imports(prompt)}\n\n{extract_code(completion)}"
        result = check_solution(prompt, program, test, conversation["entry_point"], allow_weak=self.allow_weak)
        return int(result.success)
