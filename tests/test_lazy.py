import pytest

import hf_chts
import hf_chts.data
import hf_chts.evaluation


@pytest.mark.parametrize("package", [hf_chts, hf_chts.data, hf_chts.evaluation])
def test_every_public_name_can_be_imported(package):
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # noqa: B018
