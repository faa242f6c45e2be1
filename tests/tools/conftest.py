import pytest
from small_tree import BASE, COUNT, SPINE, Tree


@pytest.fixture
def empty(tmp_path, capsys):
    return Tree(tmp_path, capsys)


@pytest.fixture
def tree(empty):
    empty.write("nb_src/story.py", SPINE)
    empty.write("nb_src/alpha/base.py", BASE)
    empty.write("nb_src/alpha/count.py", COUNT)
    return empty
