import pyarrow as pa
import pytest
from trees import make_recipe

from codellama.artifact import new_folder, write_manifest
from codellama.data.corpus import KIND, SCHEMA, ShardWriter
from codellama.data.vocabulary import prepare_tokenizer
from codellama.recipe import TokenizerSettings
from codellama.tokenizer import Tokenizer


def recipe_with(work, texts, **tokenizer):
    recipe = make_recipe(work, work)
    with new_folder(recipe.corpus_dir) as folder:
        shards = []
        for split in ("train", "validation"):
            writer = ShardWriter(folder, split)
            for text in texts:
                row = dict.fromkeys(("source", "repository", "path", "language", "licence"), "x")
                marked = text if split == "train" else "# ZZZZQ ZZZZQ\n" * 2000
                row |= {"text": marked, "n_bytes": len(marked.encode()), "sha256": "0" * 64}
                writer.add(pa.Table.from_pylist([{**row, "split": split}], schema=SCHEMA))
            writer.close()
            shards += writer.shards
        write_manifest(folder, KIND, shards=shards, fingerprint="f")
    return recipe.model_copy(update={"tokenizer": TokenizerSettings(**tokenizer)})


def test_vocabulary_is_learned_from_training_documents(tmp_path, stdlib_sources):
    recipe = recipe_with(tmp_path, stdlib_sources[:10], vocab_size=400)
    folder = prepare_tokenizer(recipe)
    assert folder == tmp_path / "tokenizer"
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.vocab_size == 404
    assert tokenizer.supports_infilling
    assert not any("ZZZ" in tokenizer.piece(i) for i in range(404))
    assert {path.name for path in folder.iterdir()} >= {"tokenizer.model", "tokenizer.json"}
    modified = (folder / "tokenizer.model").stat().st_mtime_ns
    assert prepare_tokenizer(recipe) == folder
    assert (folder / "tokenizer.model").stat().st_mtime_ns == modified


def test_sample_is_limited(tmp_path, stdlib_sources):
    last = stdlib_sources[10] + "QQQQQQJ = 1\n" * 3000
    texts = [*stdlib_sources[:10], last]
    n_bytes = sum(len(text.encode()) for text in texts[:10])
    few = recipe_with(tmp_path / "few", texts, vocab_size=400, sample_bytes=n_bytes)
    everything = recipe_with(tmp_path / "all", texts, vocab_size=400)

    def pieces(recipe):
        tokenizer = Tokenizer.load(prepare_tokenizer(recipe))
        return [tokenizer.piece(i) for i in range(404)]

    assert not any("QQQ" in piece for piece in pieces(few))
    assert any("QQQ" in piece for piece in pieces(everything))


def test_existing_vocabulary_is_taken(tmp_path, small_tokenizer):
    small_tokenizer.save(tmp_path / "given")
    recipe = recipe_with(tmp_path, ["x = 1\n"], path=tmp_path / "given")
    assert Tokenizer.load(prepare_tokenizer(recipe)).vocab_size == small_tokenizer.vocab_size


def test_folder_with_another_vocabulary_is_refused(tmp_path, small_tokenizer):
    recipe = recipe_with(tmp_path, ["x = 1\n"], vocab_size=400)
    small_tokenizer.save(recipe.tokenizer_dir)
    with pytest.raises(ValueError, match=r"another vocabulary \(604 ids\).*delete it"):
        prepare_tokenizer(recipe)


def test_problems_are_named(tmp_path):
    with pytest.raises(ValueError, match="corpus"):
        prepare_tokenizer(make_recipe(tmp_path / "a", tmp_path))
    with pytest.raises(ValueError, match="no vocabulary of 8192 pieces"):
        prepare_tokenizer(recipe_with(tmp_path / "b", ["x = 1\n"], vocab_size=8192))
    assert not (tmp_path / "b" / "tokenizer").exists()
