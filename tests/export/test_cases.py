"""Every method and variant: what is exported loads plain with the same logits, and sparse with the same topology."""

import pytest
import torch
from cases import CASES, check_links, same_weights, trainer
from transformers import AutoModelForCausalLM

from hf_chts import SparsityHandle, export_sparse, load_sparse


@pytest.mark.parametrize("case", CASES)
def test_export_and_reload(tmp_path, case):
    run = trainer(tmp_path / "run", case, save_strategy="no")
    run.train()
    export_sparse(run.model, tmp_path / "export")
    ids = torch.arange(16).reshape(2, 8)
    run.model.eval()
    with torch.no_grad():
        logits = run.model(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
        assert plain(ids).logits.equal(logits)
    for name, mask in run.sparse.masks().items():
        assert plain.get_parameter(f"{name}.weight")[~mask].eq(0).all()
    again = load_sparse(tmp_path / "export")
    sparse = SparsityHandle.of(again)
    assert sparse.config == run.sparse.config
    assert all(mask.equal(run.sparse.masks()[name]) for name, mask in sparse.masks().items())
    assert same_weights(dict(again.state_dict()), dict(run.model.state_dict()))
    check_links(sparse, sparse.config.sparsity)
