"""Bodies of requests to `/v1/ep/*`."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.openai.bodies.body import Body, NumberOf, exactly_one


class RebalanceBody(Body):
    """What `/v1/ep/rebalance` is asked to do."""

    action: Literal["start", "abort", "dry_run"]


MAX_RANKS = 4096  # that can be named in a list
RankList = Annotated[list[NumberOf], Field(min_length=1, max_length=MAX_RANKS)]


class RanksBody(Body):
    """Which ranks `/v1/ep/ranks` is to have leave, and how, or come back."""

    model_config = ConfigDict(json_schema_extra=exactly_one("remove", "add"))
    remove: RankList | None = None
    requests: Literal["finish", "move"] = "finish"
    add: RankList | None = None

    @model_validator(mode="after")
    def check_one_of_them(self) -> "RanksBody":
        if (self.remove is None) == (self.add is None):
            raise ApiError(400, "give either `remove` or `add`, a list of ranks", "remove")
        return self
