"""Names of attention: a dry run knows what a run would refuse."""

from __future__ import annotations

import pytest

from liger_cli.errors import ConfigError


@pytest.mark.parametrize(("name", "near"), [("EAGER", "eager"), ("spda", "sdpa"), ("own", "")])
def test_unknown_attention_is_refused_before_the_run(train, name, near):
    done = train("--attn-implementation", name, "--dry-run")
    assert done.code == ConfigError.exit_code
    assert f"attn_implementation '{name}' is unknown" in done.err
    assert not near or f"did you mean {near}?" in done.err
    assert "liger_varlen" in done.err


@pytest.mark.parametrize("name", ["eager", "sdpa", "liger_varlen"])
def test_known_attention_passes(train, name):
    assert train("--attn-implementation", name, "--dry-run").code == 0


def test_attention_that_another_program_registers_is_known(train):
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    AttentionInterface.register("own_attention", ALL_ATTENTION_FUNCTIONS["sdpa"])
    try:
        assert train("--attn-implementation", "own_attention", "--dry-run").code == 0
    finally:
        del AttentionInterface._global_mapping["own_attention"]
