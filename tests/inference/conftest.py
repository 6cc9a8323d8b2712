import pytest
from small_chat_model import make_home


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("models"))
