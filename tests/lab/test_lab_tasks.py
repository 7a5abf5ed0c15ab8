"""Tasks: batches are functions of seed and step, an epoch has every image once, a score is the same each time."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from schatten.lab.data import Corpus
from schatten.lab.images import Images
from schatten.lab.models import GPT, MLP, GPTConfig
from schatten.lab.tasks import EVAL_BATCH, Classification, NextToken

CPU = torch.device("cpu")
COUNT = 30


@pytest.fixture
def images():
    """Images that carry their own number."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.arange(COUNT).float()[:, None, None, None].expand(-1, 1, 2, 2)
    tests = torch.randn(EVAL_BATCH + 7, 1, 2, 2, generator=generator)
    labels = torch.randint(0, 5, (len(tests),), generator=generator)
    return Images(numbers.clone(), torch.arange(COUNT) % 5, tests, labels, 5, "made")


@pytest.fixture
def corpus():
    tokens = np.random.default_rng(0).integers(0, 11, 4000)
    return Corpus(tokens[:3000], tokens[3000:], 11, "made", "")


def tasks(images, corpus):
    return [Classification(images, lambda: MLP((4, 8, 5))), NextToken(corpus, 6, lambda: GPT(GPTConfig(11, 6, 1, 1, 8)), 9)]


def test_a_batch_is_the_same_whoever_asks_and_whenever(images, corpus):
    for task in tasks(images, corpus):
        torch.manual_seed(1)
        first = task.batch(4, seed=3, step=5)
        torch.manual_seed(2)
        task.batch(4, seed=0, step=0)
        again = task.batch(4, seed=3, step=5)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        for seed, step in ((3, 6), (4, 5)):
            assert not torch.equal(first[0], task.batch(4, seed=seed, step=step)[0])


@pytest.mark.parametrize("size", [1, 4, 7, 30, 45, 100])
def test_an_epoch_has_every_image_once_however_batches_cut_it(images, size):
    task = Classification(images, lambda: MLP((4, 5)))
    steps = math.ceil(3 * COUNT / size)
    batches = [task.batch(size, seed=0, step=step) for step in range(steps)]
    assert all(len(labels) == size for _, labels in batches)
    seen = torch.cat([pixels[:, 0, 0, 0] for pixels, _ in batches]).int()
    for epoch in range(3):
        assert sorted(seen[epoch * COUNT : (epoch + 1) * COUNT].tolist()) == list(range(COUNT))
    assert not torch.equal(seen[:COUNT], seen[COUNT : 2 * COUNT])
    for pixels, labels in batches:
        assert torch.equal(pixels[:, 0, 0, 0].long() % 5, labels)


def test_the_order_of_images_hangs_on_the_seed_not_on_the_batch_size(images):
    task = Classification(images, lambda: MLP((4, 5)))
    one = torch.cat([task.batch(5, seed=8, step=step)[0] for step in range(6)])
    assert torch.equal(one, task.batch(30, seed=8, step=0)[0])


def test_scores_are_those_of_all_tests_at_once_and_the_same_each_time(images, corpus):
    torch.manual_seed(0)
    for task in tasks(images, corpus):
        model = task.model().eval()
        with torch.no_grad():
            first, again = task.evaluate(model, CPU), task.evaluate(model, CPU)
            assert first == again
            if isinstance(task, Classification):
                scores = model(images.test)
                expected = F.cross_entropy(scores, images.test_labels).item()
                right = (scores.argmax(-1) == images.test_labels).sum().item()
                assert first["accuracy"] == right / len(images.test)
            else:
                # 9 windows of 6 tokens, spread over the 166 that there are.
                starts = [6 * round(i * 165 / 8) for i in range(9)]
                rows = torch.from_numpy(np.stack([corpus.validation[s : s + 7] for s in starts]))
                expected = model(rows[:, :-1], rows[:, 1:]).item()
        # fp32 sums in pieces.
        assert first["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_score_weighs_pieces_by_their_size(images):
    """263 tests are 256 and 7: a mean of two means would count the seven 37 times."""
    task = Classification(images, lambda: MLP((4, 5)))
    labels = images.test_labels.clone()
    model = task.model()
    with torch.no_grad():
        images.test_labels[:] = model(images.test).argmax(-1)
        images.test_labels[EVAL_BATCH:] = (images.test_labels[EVAL_BATCH:] + 1) % 5
        assert task.evaluate(model, CPU)["accuracy"] == pytest.approx(EVAL_BATCH / (EVAL_BATCH + 7))
    images.test_labels[:] = labels


def test_validation_tokens_are_none_of_training(corpus):
    task = NextToken(corpus, 6, lambda: GPT(GPTConfig(11, 6, 1, 1, 8)))
    ids, targets = task.batch(500, seed=0, step=0)
    text = "".join(map(chr, corpus.train))
    assert all("".join(map(chr, [*row.tolist(), last])) in text for row, last in zip(ids, targets[:, -1].tolist(), strict=True))
    assert torch.equal(ids[:, 1:], targets[:, :-1])


def test_fresh_weights_come_from_torchs_generator(images, corpus):
    for task in tasks(images, corpus):
        drawn = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            drawn.append(torch.cat([p.flatten() for p in task.model().parameters()]))
        assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
