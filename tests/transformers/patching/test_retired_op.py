"""fused_add_rms_norm, which patching ran once: old requests are read, and it has no effect."""

from __future__ import annotations

import logging

import pytest
import zoo

from liger_cli.config import RunConfig
from liger_cli.errors import ConfigError
from liger_cli.report.required_ops import parse_ops
from liger_kernels.ops.backend import INTERPRETED
from liger_kernels.transformers import AutoLigerKernelForCausalLM, apply_liger_kernel, inspect_model
from liger_kernels.transformers.patching import selection
from liger_kernels.transformers.patching.selection import resolve_ops

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter")

NAME = "fused_add_rms_norm"
LINE = f"{NAME} is no longer patched: naming it has no effect; remove it from ops"


@pytest.fixture
def lines(caplog):
    """The lines that were logged; the process is as if it had logged none before."""
    selection._note_retired.cache_clear()
    with caplog.at_level(logging.WARNING, selection.__name__):
        yield lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("old", "now"),
    [
        (f"auto,-{NAME}", "auto"),
        ("all,-fused-add-rmsnorm", "all"),
        (f"rms_norm,{NAME}", "rms_norm"),
        (("rope", "add_rms_norm"), "rope"),
        (NAME, "none"),
    ],
)
def test_an_old_request_is_the_same_without_the_op(old, now, lines):
    assert resolve_ops(old) == resolve_ops(now)
    assert lines() == [LINE]
    resolve_ops(old)
    assert lines() == [LINE]


def test_a_removal_alone_is_still_an_error():
    with pytest.raises(ValueError, match="removes from nothing"):
        resolve_ops(f"-{NAME}")


def test_an_old_configuration_is_read(lines):
    assert RunConfig(model="llama", ops=f"auto,-{NAME}").ops == f"auto,-{NAME}"
    assert lines() == [LINE]


def test_it_cannot_be_required():
    with pytest.raises(ConfigError, match=f"unknown op '{NAME}' here: patching does not use it"):
        parse_ops("auto", NAME)


def test_no_module_of_a_plan_runs_it():
    plan = inspect_model(zoo.build("llama"), f"all,{NAME}")
    assert NAME not in plan.coverage
    assert plan.missing == ()
    assert "model.layers.0" not in {row["name"] for row in plan.modules}


@pytest.mark.parametrize("value", [True, False])
def test_its_option_is_taken_by_loaders_and_families(value, lines):
    config = zoo.config_of("llama")
    model = AutoLigerKernelForCausalLM.from_config(config, fused_add_rms_norm=value)
    assert lines() == [LINE]
    import liger_kernels.transformers as library

    stock = zoo.build("llama")
    record = library.apply_liger_kernel_to_llama(model=stock, fused_add_rms_norm=value)
    wanted = apply_liger_kernel(zoo.build("llama")).coverage
    assert record.coverage == wanted
    assert inspect_model(model).coverage == wanted
