"""Cost models: seconds of a plan on a given machine."""

from pathlib import Path

from rq_ep.core.cost import CostModel
from rq_ep.core.errors import check_choice
from rq_ep.costs.measured import Profile
from rq_ep.costs.roofline import MACHINES, Roofline


def cost_model(text: str) -> CostModel:
    """The cost model that a command line names.

    Args:
        text: a machine of the table, a YAML file with the rates of another, or the JSON file of `rq-ep profile`.

    Raises:
        UserError: there is no such machine or file, or the file is something else.
    """
    suffix = Path(text).suffix.lower()
    if suffix == ".json":
        return Profile.load(text)
    if suffix in (".yaml", ".yml"):
        return Roofline.load(text)
    return MACHINES[check_choice("machine", text, [*MACHINES, "FILE.yaml", "PROFILE.json"])]


__all__ = ["MACHINES", "Profile", "Roofline", "cost_model"]
