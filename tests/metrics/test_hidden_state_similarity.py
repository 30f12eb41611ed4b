"""Hidden states at the last token whatever the padding, and what their cosine does and does not see."""

from __future__ import annotations

import pytest
import torch

from mmalign.core.seeding import generator
from mmalign.errors import DataError
from mmalign.metrics.representation import hidden_state_similarity
from mmalign.policies.hidden_states import collect_hidden_states
from mmalign.policies.loading import ModelOptions, load_policy


@pytest.fixture(scope="module")
def model():
    return load_policy(ModelOptions(path="asset:tiny_llama")).module


def batch(rows: list[list[int]], *, left: bool) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, at], mask[i, at] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def test_side_of_the_padding_does_not_matter(model):
    rows = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
    alone = torch.cat([collect_hidden_states(model, batch([row], left=False)) for row in rows], dim=1)
    assert alone.shape == (3, 3, 64)
    for left in (False, True):
        for position in ("last", "mean"):
            together = collect_hidden_states(model, batch(rows, left=left), position=position)
            expected = alone if position == "last" else torch.cat(
                [collect_hidden_states(model, batch([row], left=False), position="all").mean(2) for row in rows], dim=1)
            torch.testing.assert_close(together, expected, atol=1e-5, rtol=1e-4)


def test_layers_and_refusals(model):
    rows = batch([[5, 6, 7]], left=False)
    every = collect_hidden_states(model, rows)
    assert torch.equal(collect_hidden_states(model, rows, layers=(-1, 0)), every[[2, 0]])
    embedding = model.get_input_embeddings().weight[7].detach()
    torch.testing.assert_close(every[0, 0], embedding)
    with pytest.raises(ValueError, match="layers"):
        collect_hidden_states(model, rows, layers=(3,))
    with pytest.raises(ValueError, match="position"):
        collect_hidden_states(model, rows, position="first")
    with pytest.raises(ValueError, match="row 1 has no token"):
        collect_hidden_states(model, {"input_ids": torch.ones(2, 2, dtype=torch.long),
                                      "attention_mask": torch.tensor([[1, 1], [0, 0]])})


def test_a_model_is_like_itself_and_scale_plays_no_part():
    states = torch.randn(4, 6, 8, generator=generator(0, "test"))
    for centred in (False, True):
        torch.testing.assert_close(hidden_state_similarity(states, states, centred=centred),
                                   torch.ones(4, dtype=torch.float64), atol=1e-6, rtol=0)
    other = torch.randn(4, 6, 8, generator=generator(1, "test"))
    scaled = other * torch.tensor([1.0, 10.0, 0.1, 3.0])[:, None, None]
    torch.testing.assert_close(hidden_state_similarity(states, other), hidden_state_similarity(states, scaled))


def test_a_common_direction_hides_differences_until_centred():
    """The trap: anisotropy makes plain cosines of unrelated states high."""
    common = 20 * torch.ones(1, 1, 16)
    first = common + torch.randn(1, 200, 16, generator=generator(2, "test"))
    second = common + torch.randn(1, 200, 16, generator=generator(3, "test"))
    assert float(hidden_state_similarity(first, second)) > 0.99
    assert abs(float(hidden_state_similarity(first, second, centred=True))) < 0.1


def test_refused_shapes():
    states = torch.ones(2, 3, 4)
    for other in (torch.ones(3, 3, 4), torch.ones(2, 3, 5), torch.ones(2, 4, 4)):
        with pytest.raises(DataError, match="shapes"):
            hidden_state_similarity(states, other)
    with pytest.raises(DataError, match="zero"):
        hidden_state_similarity(states, states, centred=True)
    with pytest.raises(DataError, match="two rows"):
        hidden_state_similarity(states[:, :1], states[:, :1], centred=True)
