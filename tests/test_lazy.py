import pytest
from cases import trainer

import hf_chts
import hf_chts.data
import hf_chts.evaluation


@pytest.mark.parametrize("package", [hf_chts, hf_chts.data, hf_chts.evaluation])
def test_every_public_name_can_be_imported(package):
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_old_names_work_for_a_release(tmp_path):
    with pytest.warns(DeprecationWarning, match="SparsityHandle"):
        assert hf_chts.SparseModel is hf_chts.SparsityHandle
    run = trainer(tmp_path, "set")
    with pytest.warns(DeprecationWarning, match="trainer.evolver"):
        assert run.topology is run.evolver
