"""A step's passes as one CUDA graph, for models of so many small kernels that the host cannot keep up with the GPU."""

from collections.abc import Callable

import torch

from radlads.config.schema import TrainConfig
from radlads.distill.stage import Stage
from radlads.model.modeling import RadladsForCausalLM
from radlads.model.registry import all_can
from radlads.train.optimizers.step import PartSum

# Of the GPU's memory that gradients may take: beyond it a step's kernels are large enough for the host to keep up, and
# what the graph holds on to between steps is better left to others
_SMALL_SHARE = 0.1


def records_graph(train: TrainConfig, stage: Stage, student: RadladsForCausalLM, *, compiled: bool) -> bool:
    """What train.cuda_graphs means to a student that this GPU holds whole. compiled: whether its blocks are."""
    if train.cuda_graphs != "auto":
        return train.cuda_graphs == "always"
    # A user's own mixer may wait for the device, which a graph cannot record; so does counting labels in every batch
    masks = train.mask_labels_at_eos and stage.name != "align"
    counts_labels = stage.name == "instruct" or train.reset_state_at_eos or masks
    if not compiled or not all_can(student.config, "CUDA graph") or counts_labels:
        return False
    if stage.name == "align":
        return True
    gradients = sum(each.numel() * each.element_size() for each in student.parameters() if each.requires_grad)
    return gradients <= _SMALL_SHARE * torch.cuda.get_device_properties(student.device).total_memory


class GraphedPasses:
    """A micro-batch's passes on CUDA, `run`, recorded and replayed: gradients of `student`, sums and counts.

    The first calls run as ever, which compiles and tunes what needs it; then a call records, and all later ones replay.
    A batch of another shape than the first is run without the graph.

    accumulates: whether a window has several batches. A replay then adds to the gradients, which are zeroed where a
    window begins; else it writes them where the recording left them, and no gradients may be there before.
    """

    WARMUP_CALLS = 2

    def __init__(
        self,
        run: Callable[[torch.Tensor], list[PartSum]],
        student: RadladsForCausalLM,
        teacher: RadladsForCausalLM | None,
        *,
        accumulates: bool = False,
    ):
        self._run, self._accumulates = run, accumulates
        self._models = [student] if teacher is None else [student, teacher]
        self._read_by_graph: list[object] = []
        self._parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self._calls = 0
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._tokens: torch.Tensor | None = None
        self._sums: list[PartSum] = []
        self._trains: list[bool] = []  # of each parameter, whether it gets a gradient at all
        self._gradients: list[torch.Tensor | None] = []

    def __call__(self, tokens: torch.Tensor) -> list[PartSum]:
        """As run(tokens)."""
        if self._tokens is None:
            self._tokens = torch.empty_like(tokens)
        if tokens.shape != self._tokens.shape:
            return self._run(tokens)
        self._calls += 1
        if self._calls <= self.WARMUP_CALLS:
            return self._run_beside(tokens)
        self._tokens.copy_(tokens)
        if self._graph is None:
            self._record()
        assert self._graph is not None
        self._put_gradients()
        self._graph.replay()
        return [part._replace(sum=part.sum.clone()) for part in self._sums]

    def _run_beside(self, tokens: torch.Tensor) -> list[PartSum]:
        """Run on the stream that will record: what autograd remembers of streams is then the same."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            sums = self._run(tokens)
        torch.cuda.current_stream().wait_stream(self._stream)
        self._trains = [parameter.grad is not None for parameter in self._parameters]
        return sums

    def _put_gradients(self) -> None:
        """Let the parameters' gradients be where a replay puts them; what a window has added up so far comes along."""
        pairs = [pair for pair in zip(self._parameters, self._gradients, strict=True) if pair[0].grad is not pair[1]]
        if self._accumulates:
            new = [own for parameter, own in pairs if own is not None and parameter.grad is None]
            if new:
                torch._foreach_zero_(new)
        for parameter, own in pairs:
            if parameter.grad is not None and own is not None:
                own.copy_(parameter.grad)
            parameter.grad = own

    def _record(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        assert self._tokens is not None
        for model in self._models:  # sequences of another length since the last call have replaced these tables
            model.model.share_whole_sequences(self._tokens.shape[1] - 1, self._tokens.device)
        if self._accumulates:
            self._gradients = [
                torch.empty_like(parameter) if trains else None
                for parameter, trains in zip(self._parameters, self._trains, strict=True)
            ]
            self._put_gradients()
        torch.clear_autocast_cache()  # weights cast earlier would be replayed as they were then
        try:
            with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
                self._sums = self._run(self._tokens)
        except RuntimeError as error:  # ending a recording that failed fails too, and hides why
            if isinstance(error.__context__, torch.OutOfMemoryError):
                raise error.__context__ from None
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error.__context__ or error).partition("\n")[0]  # CUDA goes on with advice for its programmers
            raise ValueError(
                f"a step of this stage cannot be recorded as a CUDA graph ({reason}): set train.cuda_graphs never"
            ) from error
        torch.clear_autocast_cache()
        # Another sequence length would make the models forget the tables that the graph reads
        self._read_by_graph = [model.model.whole_sequences for model in self._models]
        if not self._accumulates:
            self._gradients = [parameter.grad for parameter in self._parameters]
