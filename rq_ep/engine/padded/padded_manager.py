"""Continuous batching over dense caches: the family's own cache object, as `generate` uses it.

The paged cache of transformers knows full and sliding attention alone. Here a request is a row of a `DynamicCache`,
which holds whatever the layers of a family keep: keys and values, the keys of an indexer, convolutional and recurrent
states. The design is the simplest that keeps all ranks in lockstep:

* A step is **one** forward pass, so that the agreement before it is all that ranks without a row need to follow with an
  empty step: either the next chunk of one prompt, or one token of every row of a group.
* A prompt runs alone and without padding, so that no recurrent state sees a padded token. When it is done its row joins
  the group: the shorter of both is padded on the left with zeros, which attention masks. Each row keeps the positions
  that it has alone. A row that ends is taken out, and what is then padding of all rows is cut off.
* Families whose caches cannot be joined (a cache of their own, or frequencies that follow the length of a sequence)
  have groups of one row, which take turns. Families that cannot go on from a state with several tokens
  (`WHOLE_PROMPT_MODEL_TYPES`) get a prompt as a whole.
* Between two rounds over the groups, prompts get about `max_num_batched_tokens` tokens: short ones start together, and
  a long one does not hold up the answers under way.
* The room counts positions: rows times the longest row, padding included. Where a step would exceed it, the newest row
  gives way: it waits, first in line, and its cache is computed anew once a request has ended. The tokens of an answer
  depend on seed and position alone, so that it goes on as it would have.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch
from transformers.generation.continuous_batching.continuous_api import OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from rq_ep.core.errors import UserError
from rq_ep.engine.empty_step import WARMUP_TOKENS
from rq_ep.engine.output_processor import RequestState, choose_tokens
from rq_ep.engine.padded.row_groups import DenseForward, RowGroup, SequenceRow
from rq_ep.engine.requests import Batch, Request
from rq_ep.engine.step_loop import Batches
from rq_ep.parallel import TorchGroup
from rq_ep.parallel.agreement import run_on_all_ranks

MEMORY_SHARE = 0.6  # of a GPU's free memory for rows: a layer's keys and values are there twice while they grow


class PaddedManager:
    """The thread of an engine, and the batches of its steps.

    Args:
        forward: forward passes of the model.
        step: makes one step of the group with the batches of this manager; False ends the loop, on every rank.
        wake_up: ends the sleep of an idle loop; a request that is added sets it too.
        outputs: gets what each step has made.
        max_num_seqs: rows at once.
        max_num_batched_tokens: tokens of prompts between two rounds of answers, and of one chunk.
        kv_cache_tokens: positions of all rows, padding included; None: what a GPU has left, known after `begin`.
        requests: the requests of this rank that are still wanted, by id.
        on_failure: called with an error that ends the loop; the others wait for this rank, so it must end the process.
    """

    def __init__(
        self,
        forward: DenseForward,
        *,
        step: Callable[[Batches], bool],
        wake_up: threading.Event,
        outputs: OutputRouter,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        kv_cache_tokens: int | None,
        requests: Mapping[str, RequestState],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._forward = forward
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._kv_cache_tokens = kv_cache_tokens
        self._requests = requests
        self._on_failure = on_failure
        self._step = step
        self._wake_up = wake_up
        self._outputs = outputs
        self._thread: threading.Thread | None = None
        self.keeps_running = True
        self.stops_now = False
        self._waiting: deque[SequenceRow] = deque()
        self._groups: deque[RowGroup] = deque()  # the next one first
        self._prompt: RowGroup | None = None  # a row whose prompt is under way
        self._prompt_tokens_left = max_num_batched_tokens  # before the next round over the groups
        self._num_turns = 0  # of groups, in this round
        self._num_admitted = 0
        self._admits = True  # False from when a row has given way until a request ends
        self._next: tuple[RowGroup, int] | None = None  # the group of the next step, and how many tokens of each row
        self._is_running = False  # a forward pass over that group

    def begin(self, group: TorchGroup) -> None:
        """Run a prompt and a token after it, so that a forward pass that fails does so now; every rank calls this.

        Where the room was not given it follows from what these tokens took.

        Raises:
            UserError: a rank has no room.
        """
        row = SequenceRow(Request("warm-up", [0] * WARMUP_TOKENS, 1), [0] * (WARMUP_TOKENS + 1), 0.0)
        rows = RowGroup(row, self._forward.new_cache())
        with torch.inference_mode():
            for num_tokens in (WARMUP_TOKENS, 1):
                self._forward(rows, num_tokens)
        if self._kv_cache_tokens is None:
            self._kv_cache_tokens = run_on_all_ranks(group, lambda: self._num_positions_free(*rows.cache_bytes()))

    def _num_positions_free(self, row_bytes: int, position_bytes: int) -> int:
        free_bytes = torch.cuda.mem_get_info(self._forward.device)[0]
        room = int(MEMORY_SHARE * free_bytes) - self._max_num_seqs * row_bytes
        if room < position_bytes:
            raise UserError(
                f"--max-num-seqs {self._max_num_seqs}: the states of so many requests, {row_bytes:,} bytes each, "
                f"do not fit into {free_bytes:,} bytes of GPU memory: lower it"
            )
        return room // max(position_bytes, 1)

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._run_loop, name="rq_ep engine")
        self._thread.start()

    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def stop(self, block: bool) -> None:
        """Ask for the end, and perhaps wait for it. It comes once every rank has been asked."""
        self.keeps_running = False
        self._wake_up.set()
        if block and self._thread is not None:
            self._thread.join()

    def submit(self, request: Request) -> None:
        """Take a request; any thread may."""
        self._waiting.append(SequenceRow(request, list(request.prompt_ids), time.perf_counter()))
        self._wake_up.set()

    def cancel_request(self, request_id: str) -> None:
        """Let a request go that is no longer among the wanted ones; before its next step it is looked up there."""
        self._wake_up.set()

    def _run_loop(self) -> None:
        try:
            if self._forward.device.type == "cuda":
                torch.cuda.set_device(self._forward.device)
            with torch.inference_mode():
                while self._step(self):
                    pass
        except BaseException as error:
            self._on_failure(error)
            raise

    # What the engine shows

    @property
    def max_request_tokens(self) -> int:
        """The longest request that there is room for."""
        assert self._kv_cache_tokens is not None
        return self._kv_cache_tokens

    @property
    def num_running(self) -> int:
        """Rows, one whose prompt is under way included."""
        return sum(len(group.rows) for group in self._all_groups())

    @property
    def kv_cache_usage(self) -> float:
        """Share of the room that rows take."""
        return self._num_positions() / self.max_request_tokens

    def _all_groups(self) -> list[RowGroup]:
        return [*self._groups, *([] if self._prompt is None else [self._prompt])]

    def _num_positions(self) -> int:
        prompt = 0 if self._prompt is None else self._prompt.rows[0].num_prefill
        return sum(group.num_positions for group in self._groups) + prompt

    # The batches of a `StepLoop`

    def has_requests(self) -> bool:
        return bool(self._waiting or self._groups or self._prompt)

    def prepare(self) -> bool:
        self._drop_unwanted()
        self._restart_outgrown()
        self._make_room()
        if self._prompt is None:
            self._admit()
        if self._prompt is not None and (self._prompt_tokens_left > 0 or not self._groups):
            row = self._prompt.rows[0]
            self._next = self._prompt, self._forward.chunk_size(row, self._max_num_batched_tokens)
        else:
            self._next = (self._groups[0], 1) if self._groups else None
        return self._next is not None

    def contents(self) -> Batch:
        assert self._next is not None
        group, num_tokens = self._next
        has_images = any(row.request.images and not row.num_computed for row in group.rows)
        parts = [(row.request.id, num_tokens) for row in group.rows]
        return Batch(parts, self.has_prompts(), has_images, [row.num_computed for row in group.rows])

    def has_prompts(self) -> bool:
        return self._next is not None and self._next[0] is self._prompt

    def run(self) -> None:
        assert self._next is not None
        group, num_tokens = self._next
        now_s = time.perf_counter()
        for row in group.rows:
            row.started_s = now_s if row.started_s is None else row.started_s
        self._is_running = True
        logits_BV = self._forward(group, num_tokens)
        self._is_running = False
        if group is not self._prompt:
            self._deliver_tokens(group, logits_BV)
            self._groups.rotate(-1)
            self._num_turns += 1
            if self._num_turns >= len(self._groups):
                self._num_turns, self._prompt_tokens_left = 0, self._max_num_batched_tokens
            return
        self._prompt_tokens_left -= num_tokens
        row = group.rows[0]
        if row.num_computed == row.num_prefill:
            self._prompt = None
            self._deliver_tokens(group, logits_BV)
            if row.request.id in self._requests:
                self._insert(group)
        elif self._forward.device.type == "cuda":  # a step must be over when the group agrees on the next one
            torch.cuda.current_stream().synchronize()

    def restart(self) -> None:
        """Compute the rows whose forward pass was cut off anew: some layers have their tokens, and others do not."""
        if not self._is_running:
            return
        assert self._next is not None
        self._is_running = False
        group, _ = self._next
        if group is self._prompt:
            self._prompt = None
        else:
            self._groups.remove(group)
        for row in reversed(group.rows):
            self._wait_again(row)

    # Rows that come and go

    def _drop_unwanted(self) -> None:
        """Let rows go that have ended, were cancelled, or have logits that are not finite."""
        if self._prompt is not None and self._prompt.rows[0].request.id not in self._requests:
            self._prompt, self._admits = None, True
        for group in list(self._groups):
            self._remove(group, [row for row in group.rows if row.request.id not in self._requests])
        while self._waiting and self._waiting[0].request.id not in self._requests:
            self._waiting.popleft()

    def _remove(self, group: RowGroup, rows: Sequence[SequenceRow]) -> None:
        if not rows:
            return
        self._admits = True
        if left := [row for row in group.rows if row not in rows]:
            group.keep(left)
        else:
            self._groups.remove(group)

    def _restart_outgrown(self) -> None:
        """Have the cache of rows computed anew whose frequencies change with the next token, before all others."""
        for group in list(self._groups):
            outgrown = [row for row in group.rows if row.num_computed == self._forward.recompute_after]
            self._remove(group, outgrown)
            for row in outgrown:
                self._wait_again(row)

    def _wait_again(self, row: SequenceRow) -> None:
        row.num_computed = 0
        self._waiting.appendleft(row)

    def _make_room(self) -> None:
        """Have the newest rows give way until the next group has room for a token of each row; one row has room."""
        while self._groups and self.num_running > 1:
            if self._num_positions() + len(self._groups[0].rows) <= self.max_request_tokens:
                return
            group, row = max(
                ((group, row) for group in self._all_groups() for row in group.rows), key=lambda item: item[1].order
            )
            if group is self._prompt:
                self._prompt = None
            else:
                self._remove(group, [row])
            self._wait_again(row)
            self._admits = False

    def _admit(self) -> None:
        """Begin the prompt of the next request, if there is room."""
        is_idle = not self._groups
        if not self._waiting or self.num_running >= self._max_num_seqs or not (self._admits or is_idle):
            return
        row = self._waiting[0]
        num_tokens = len(row.token_ids)
        if self._forward.takes_rows and self._groups:
            group = self._groups[0]
            num_positions = (len(group.rows) + 1) * (max(group.width, num_tokens) + 1)
        else:
            num_positions = self._num_positions() + num_tokens + 1
        if num_positions > self.max_request_tokens and not is_idle:
            return
        self._waiting.popleft()
        self._admits = True
        self._num_admitted += 1
        row.order, row.num_prefill = self._num_admitted, num_tokens
        self._prompt = RowGroup(row, self._forward.new_cache())

    def _insert(self, group: RowGroup) -> None:
        if self._forward.takes_rows and self._groups:
            self._groups[0].join(group)
        else:
            self._groups.append(group)

    def _deliver_tokens(self, group: RowGroup, logits_BV: torch.Tensor) -> None:
        """Choose the next token of every row; a row that ends is wanted no more, and goes before the next step."""
        states = [self._requests.get(row.request.id) for row in group.rows]
        tokens_B = choose_tokens(logits_BV, states, [len(row.token_ids) for row in group.rows])
        for row, token in zip(group.rows, tokens_B.tolist(), strict=True):
            row.token_ids.append(token)
        outputs = [self._output(row, state) for row, state in zip(group.rows, states, strict=True)]
        self._outputs.deliver_batch(outputs)

    def _output(self, row: SequenceRow, state: RequestState | None) -> GenerationOutput:
        ends_itself = state is not None and row.token_ids[-1] in state.end_token_ids
        has_ended = ends_itself or len(row.answer_ids) >= row.request.max_tokens
        assert row.started_s is not None
        return GenerationOutput(
            row.request.id,
            generated_tokens=row.answer_ids,
            status=RequestStatus.FINISHED if has_ended else RequestStatus.DECODING,
            created_time=row.arrived_s,
            lifespan=(row.started_s, -1),
        )
