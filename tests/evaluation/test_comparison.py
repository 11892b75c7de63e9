import math

import numpy as np
import pytest

from hf_chts.evaluation import compare_models, jackknife, suite_averages


def result(model, rights, *, digest="d", task="rte", **more):
    """Accuracies from 0/1 per document."""
    values = np.array(rights, float)
    scores = {"acc": values.mean(), "acc_stderr": values.std(ddof=1) / math.sqrt(len(values))}
    without = {task: {"digest": digest, "without_each": {"acc": jackknife.means_without_each(values).tolist()}}}
    return {"model": model, "suite": "glue", "tasks": {task: scores}, "trivial": {}, "documents": without} | more


RIGHT = [1, 1, 1, 0, 1, 0, 1, 1, 0, 1]
WRONG = [1, 0, 1, 0, 1, 0, 0, 1, 0, 1]


def test_paired_error_is_that_of_the_differences():
    _, other = compare_models([result("a", RIGHT), result("b", WRONG)])
    found = other["difference"]["tasks"]["rte"]["acc"]
    differences = np.array(WRONG) - np.array(RIGHT)
    assert other["difference"]["baseline"] == "a"
    assert found["value"] == pytest.approx(-0.2)
    assert found["stderr"] == pytest.approx(differences.std(ddof=1) / math.sqrt(10))
    assert found["paired"] is True
    assert found["outside"] is False  # 0.2 is 1.5 errors


def test_other_documents_are_not_paired():
    first, second = result("a", RIGHT), result("b", WRONG, digest="others")
    found = compare_models([first, second])[1]["difference"]["tasks"]["rte"]["acc"]
    errors = [side["tasks"]["rte"]["acc_stderr"] for side in (first, second)]
    assert found["stderr"] == pytest.approx(math.sqrt(errors[0] ** 2 + errors[1] ** 2))
    assert found["paired"] is False
    del first["documents"]  # as read from a file
    assert compare_models([first, second])[1]["difference"]["tasks"]["rte"]["acc"] == found
    del second["tasks"]["rte"]["acc_stderr"]
    found = compare_models([first, second])[1]["difference"]["tasks"]["rte"]["acc"]
    assert (found["stderr"], found["outside"]) == (None, None)


@pytest.mark.parametrize(("shift", "outside"), [(0.199, False), (0.201, True), (-0.201, True)])
def test_outside_is_more_than_two_errors(shift, outside):
    sides = [result("a", RIGHT), result("b", RIGHT)]
    for side, value, error in zip(sides, (0.5, 0.5 + shift), (0.06, 0.08), strict=True):
        del side["documents"]
        side["tasks"]["rte"] = {"acc": value, "acc_stderr": error}
    found = compare_models(sides)[1]["difference"]["tasks"]["rte"]["acc"]
    assert found["stderr"] == pytest.approx(0.1)
    assert found["outside"] is outside


def test_the_baseline_can_be_any_of_them():
    compared = compare_models([result("a", WRONG), result("runs/b", RIGHT), result("c", RIGHT)], "runs/b/")
    assert ["difference" in entry for entry in compared] == [True, False, True]
    assert compared[0]["difference"]["tasks"]["rte"]["acc"]["value"] == pytest.approx(-0.2)
    assert compared[2]["difference"]["tasks"]["rte"]["acc"]["value"] == 0
    with pytest.raises(ValueError, match="baseline='x'.*a, b"):
        compare_models([result("a", RIGHT), result("b", RIGHT)], "x")
    with pytest.raises(ValueError, match="baseline='a'"):
        compare_models([result("a", RIGHT), result("a", RIGHT)], "a")


def test_averages_count_each_task_the_same():
    tasks = {
        "rte": {"acc": 0.5, "acc_stderr": 0.03, "mcc": 0.1, "mcc_stderr": 0.05},
        "cola": {"acc": 0.7, "acc_stderr": 0.04, "mcc": 0.3, "mcc_stderr": 0.12},
        "copa": {"acc": 0.9, "acc_stderr": 0.1},
    }
    trivial = {"rte": {"acc": 0.53, "mcc": 0.0}, "cola": {"acc": 0.69, "mcc": 0.0}}
    averages = suite_averages("glue,superglue,copa", tasks, trivial)
    assert list(averages) == ["glue"]  # one task has no average
    found = averages["glue"]["acc"]
    assert found["value"] == pytest.approx(0.6)
    assert found["stderr"] == pytest.approx(0.025)
    assert found["trivial"] == pytest.approx(0.61)
    assert sorted(found["tasks"]) == ["cola", "rte"]
    assert averages["glue"]["mcc"]["stderr"] == pytest.approx(0.065)
    assert "balanced_acc" not in averages["glue"]
    assert suite_averages("glue", tasks, {})["glue"]["acc"]["trivial"] is None
    assert suite_averages("glue", tasks, trivial, among=["rte"]) == {}


def test_difference_of_averages_is_over_the_tasks_that_all_have():
    def both(model, rte, cola):
        one, two = result(model, rte), result(model, cola, task="cola")
        return one | {"tasks": one["tasks"] | two["tasks"], "documents": one["documents"] | two["documents"]}

    first, second = both("a", RIGHT, WRONG), both("b", WRONG, WRONG)
    found = compare_models([first, second])[1]["difference"]
    average = found["averages"]["glue"]["acc"]
    assert average["value"] == pytest.approx(-0.1)
    assert average["stderr"] == pytest.approx(found["tasks"]["rte"]["acc"]["stderr"] / 2)
    assert sorted(average["tasks"]) == ["cola", "rte"]
    third = result("c", RIGHT)  # has no cola
    assert compare_models([first, second, third])[1]["difference"]["averages"] == {}
