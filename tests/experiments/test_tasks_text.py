"""The King James text: no chapter on both sides of the split, no look ahead."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bagua_jax.experiments import tasks
from bagua_jax.experiments.tasks import text
from bagua_jax.experiments.tasks.data import Shards

WINDOW = 65


@pytest.fixture(scope="module")
def kjv():
    task = tasks.kjv()
    return task, task.data(0, 8), text.chapters()


def decoded(rows: np.ndarray, chapters) -> list[str]:
    alphabet = np.array(sorted(set("".join(chapter.text for chapter in chapters))))
    return ["".join(row) for row in alphabet[rows]]


def windows(chapter) -> list[str]:
    count = len(chapter.text) // WINDOW
    return [chapter.text[WINDOW * i : WINDOW * (i + 1)] for i in range(count)]


def test_the_text_is_all_there(kjv):
    _, _, chapters = kjv
    assert len(chapters) == 1189 and chapters[-1].book == 65
    assert chapters[0].name == "Genesis 1" and chapters[-1].name == "Revelation 22"
    assert chapters[0].text.startswith("In the beginning God created the heaven and")
    assert sum(len(chapter.text) for chapter in chapters) == 4_136_263


def test_no_chapter_is_on_both_sides(kjv):
    _, data, chapters = kjv
    train = decoded(data.train["text"], chapters)
    held_out, at = [], 0
    for chapter in chapters:  # training windows come in the order of the text
        own = windows(chapter)
        if own and train[at : at + len(own)] == own:
            assert (data.labels[at : at + len(own)] == chapter.book).all()
            at += len(own)
        else:
            held_out.append(chapter)
    assert at == len(train) and len(held_out) == 1189 // 20
    unseen = {window for chapter in held_out for window in windows(chapter)}
    test = decoded(data.test["text"], chapters)
    assert len(test) == 512 and set(test) <= unseen
    assert not set(test) & set(train)


def test_the_split_is_the_seeds(kjv):
    task, data, _ = kjv
    assert np.array_equal(task.data(0, 3).test["text"], data.test["text"])
    assert not np.array_equal(task.data(1, 8).test["text"], data.test["text"])


def test_label_sharding_gives_books_of_their_own(kjv):
    _, data, _ = kjv
    members = Shards.deal(data, 8, "label", 4, seed=0).members
    books = [set(data.labels[own].tolist()) for own in members]
    for one, other in zip(books, books[1:], strict=False):
        assert max(one) <= min(other)
    everyone = Shards.deal(data, 8, "iid", 4, seed=0).members
    assert all(len(set(data.labels[own].tolist())) > 60 for own in everyone)


def test_a_later_character_changes_no_earlier_logits():
    network = text.transformer(7, window=12, width=8, heads=2, layers=2)
    tokens = jnp.arange(12)[None] % 7
    params = jax.jit(network.init)(jax.random.key(0), tokens)
    apply = jax.jit(network.apply)
    logits = apply(params, tokens)
    changed = apply(params, tokens.at[0, 5].set(0))
    np.testing.assert_array_equal(changed[0, :5], logits[0, :5])
    assert (jnp.abs(changed[0, 5:] - logits[0, 5:]).max(axis=1) > 1e-4).all()


def test_loss_is_in_nats_and_starts_near_a_guess(kjv):
    task, data, _ = kjv
    params = jax.jit(task.init)(jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(params)) == 110_592
    few = {"text": data.test["text"][:32]}
    judged = jax.jit(task.evaluate)(params, few)
    assert abs(judged["loss"] - np.log(64)) < 1
    bits = judged["loss"] / np.log(2)
    np.testing.assert_allclose(judged["bits_per_character"], bits, rtol=1e-6)
