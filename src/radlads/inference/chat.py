"""`radlads chat`: a conversation whose history is the recurrent state, so that a turn costs only its own tokens.

The state that is carried ends where the last reply began. The next turn reads that reply, as the template renders it,
and what the user says now: so it matters neither how a reply was tokenised when it was generated, nor whether it was
interrupted. Templates that render earlier turns in another way once there are later ones make the whole
conversation be read again.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Generator
from dataclasses import replace

import torch

from radlads.checkpoint.tokenizer_files import num_ids
from radlads.inference.chat_template import ChatTemplate, Message
from radlads.inference.decoder import Decoder
from radlads.inference.finite import NotFinite
from radlads.inference.generate import check_memory, choose_device, decoded
from radlads.inference.options import sampling_of
from radlads.inference.prefill import prefill
from radlads.inference.prompts import checked_text
from radlads.inference.sampling import Sampling
from radlads.model.cache import RadladsCache
from radlads.model.modeling import RadladsForCausalLM

RESET = "/reset"


class Conversation:
    """Messages so far and the state after them. system: what the conversation begins with, if anything.

    num_read: tokens that the last turn read. began_anew: whether it had to read the whole conversation again.
    """

    def __init__(
        self, model: RadladsForCausalLM, template: ChatTemplate, sampling: Sampling, *, system: str | None = None
    ):
        self.model, self.template = model, template
        self.sampling = replace(sampling, num_ids=sampling.num_ids or num_ids(template.tokenizer._tokenizer))
        self.decoder = Decoder(model, 1, self.sampling, template.stop_ids())
        self.system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.token_ids: list[int] = []
        self.cache = RadladsCache(model.config)
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = list(self.system)
        self.num_read, self.began_anew = 0, False
        self._forget_state()

    def reply(self, text: str) -> Generator[str, None, None]:
        """Read `text`, and return the reply as it comes; as far as it is taken, both become part of the history.

        Raises ValueError, before anything is generated, if the template fails or memory is too small; the history is
        then as it was.
        """
        asked: list[Message] = [*self.messages, {"role": "user", "content": text}]
        return self._said(asked, self._read(self.template.token_ids(asked)))

    def _said(self, asked: list[Message], logits: torch.Tensor) -> Generator[str, None, None]:
        answer: list[str] = []
        try:
            for piece in self._generated(logits):
                answer.append(piece)
                yield piece
        finally:
            self.messages = [*asked, {"role": "assistant", "content": "".join(answer)}]

    def _read(self, token_ids: list[int]) -> torch.Tensor:
        """Bring the state up to date with the conversation's tokens; the logits after the last one."""
        known = len(self.token_ids)
        self.began_anew = known > 0 and (token_ids[:known] != self.token_ids or len(token_ids) == known)
        if self.began_anew:
            self._forget_state()
        check_memory(self.model.config, len(token_ids) + self.sampling.max_tokens, self.model.device)
        new, cache = token_ids[len(self.token_ids) :], self.cache
        self._forget_state()  # while it is being changed: an interrupted reading leaves it halfway
        logits, cache = prefill(self.model, torch.tensor([new], device=self.model.device), cache=cache)
        self.token_ids, self.cache, self.num_read = token_ids, cache, len(new)
        return logits

    def _generated(self, logits: torch.Tensor) -> Generator[str, None, None]:
        grows = len(self.model.config.recurrent_layers) < self.model.config.num_hidden_layers
        self.decoder.begin(logits, copy.deepcopy(self.cache) if grows else self.cache)
        rows = self.decoder.generated(self.sampling.max_tokens)
        tokens = (token for (token,) in rows if token is not None)
        yield from decoded(self.template.tokenizer._tokenizer, tokens)

    def _forget_state(self) -> None:
        self.token_ids, self.cache = [], RadladsCache(self.model.config)


def converse(
    conversation: Conversation,
    read: Callable[[], str | None],
    write: Callable[[str], None],
    notice: Callable[[str], None],
) -> int:
    """Answer what `read` returns, line by line, until it returns None. Ctrl-C stops a reply; /reset begins anew.

    write: takes replies, piece by piece. notice: takes sentences about the conversation, and what is wrong with a
    message that cannot be read, which leaves no trace in it. Returns how many there were of those. What goes wrong
    later, within a reply, is raised, and so is NotFinite.
    """
    has_told, num_refused = False, 0
    while (text := read()) is not None:
        if text.strip() == RESET:
            conversation.reset()
            notice("the conversation begins anew")
        elif text.strip():
            try:
                pieces = conversation.reply(text)
            except KeyboardInterrupt:
                write("\n")
                continue
            except NotFinite:  # of the model, not of this message
                raise
            except ValueError as error:
                num_refused += 1
                notice(str(error))
                continue
            _write_out(pieces, write)
            if conversation.began_anew and not has_told:
                has_told = True
                notice(
                    "the chat template changes earlier turns: the whole conversation was read again, and may be again"
                )
    return num_refused


def _write_out(pieces: Generator[str, None, None], write: Callable[[str], None]) -> None:
    try:
        for piece in pieces:
            write(piece)
    except KeyboardInterrupt:
        pieces.close()
    write("\n")


def open_conversation(arguments: argparse.Namespace, notice: Callable[[str], None]) -> Conversation:
    """The conversation that add_chat_options' arguments describe.

    Raises ValueError for a system message that is no text, and as load_model and ChatTemplate do.
    """
    from radlads.checkpoint.model_folder import load_model, open_model

    sampling = sampling_of(arguments)
    system = None if arguments.system is None else checked_text(arguments.system, "--system")
    device, dtype = choose_device(arguments.device)
    template = ChatTemplate(arguments.folder, open_model(arguments.folder).config.vocab_size)
    if missing := template.missing_tokens():
        notice(f"warning: the chat template writes {', '.join(missing)}, which the tokenizer has no token for")
    model = load_model(arguments.folder, dtype=dtype, verify=arguments.verify).to(device)  # type: ignore[arg-type]
    return Conversation(model, template, sampling, system=system)


def line_reader() -> Callable[[], str | None]:
    """Reads what the user says: at a terminal with a prompt and a history of lines, else line by line from stdin.

    The reader returns None at the end, and raises ValueError for what is no UTF-8 text.
    """
    if not sys.stdin.isatty():
        return _piped_line
    import readline  # noqa: F401 (input() edits lines once it is imported)

    return _typed_line


def _typed_line() -> str | None:
    while True:
        try:
            return input("\n> ").encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        except EOFError:
            return None
        except KeyboardInterrupt:
            continue


def _piped_line() -> str | None:
    line = sys.stdin.buffer.readline()
    try:
        return line.decode("utf-8").rstrip("\r\n") if line else None
    except UnicodeDecodeError as error:
        raise ValueError("stdin is not UTF-8 text: give one message on each line") from error
