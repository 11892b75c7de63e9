"""Every method and variant: what is exported loads plain with the same logits, and sparse with the same topology."""

import pytest
import torch
from cases import CASES, case_config, same_weights
from tiny import tiny_llama
from transformers import AutoModelForCausalLM

from hf_chts import SparsityHandle, export_sparse, load_sparse, sparsify


@pytest.mark.parametrize("case", CASES)
def test_export_and_reload(tmp_path, case):
    model = tiny_llama().eval()
    handle = sparsify(model, case_config(case))
    export_sparse(model, tmp_path)
    ids = torch.arange(16).reshape(2, 8)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert plain(ids).logits.equal(model(ids).logits)
    again = load_sparse(tmp_path)
    sparse = SparsityHandle.of(again)
    assert sparse.config == handle.config
    for name, mask in handle.masks().items():
        assert plain.get_parameter(f"{name}.weight")[~mask].eq(0).all()
        assert sparse.masks()[name].equal(mask)
    assert same_weights(dict(again.state_dict()), dict(model.state_dict()))
