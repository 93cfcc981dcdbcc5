import pytest

from codellama.tokenizer import Tokenizer
from codellama.tokenizer.model_file import ModelFile, Piece


@pytest.fixture(scope="session")
def llama_file(shared_data):
    path = shared_data / "llama-tokenizer" / "tokenizer.model"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    return path


@pytest.fixture(scope="session")
def llama(llama_file):
    """The vocabulary of Code Llama 7B."""
    return Tokenizer.load(llama_file, variant="7b")


@pytest.fixture(scope="session")
def llama_70b(llama_file):
    """The vocabulary of Code Llama 70B Instruct."""
    return Tokenizer.load(llama_file, variant="70b-instruct")


@pytest.fixture(scope="session")
def small_source(small_tokenizer):
    """A small vocabulary of the 70B Instruct kind: `<step>`, and no dummy prefix."""
    pieces = (*small_tokenizer.file.pieces, Piece("<step>"))
    return Tokenizer(ModelFile(pieces, add_dummy_prefix=False))


@pytest.fixture(params=["small_tokenizer", "small_source", "llama"])
def tokenizer(request):
    return request.getfixturevalue(request.param)
