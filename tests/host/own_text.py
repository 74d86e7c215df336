"""Runs a job with something that no setting does: `own_text.py unused|repeated|source FOLDER JOB WORDS`.

- unused: every step samples texts, and trains on the data.
- repeated: every step is run twice, as Megatron's rerun state machine does after a result that it does not believe.
- source: Python finds modules in FOLDER.
"""

import sys

from megatron.core.rerun_state_machine import RerunState, get_rerun_state_machine

from abkd_megatron import __main__ as command_line


def unused() -> None:
    import torch

    from abkd_megatron.rollouts.own_text import OwnText
    from abkd_megatron.rollouts.sampler import Prompts

    def before_step(self: OwnText, data_iterator: object) -> bool:
        runs = self._should_run(data_iterator)
        if runs:
            prompts = torch.arange(24).view(8, 3) % 7
            lengths = torch.full((8,), 3)
            rollouts = self._sampler.sample(Prompts(prompts, lengths, 3, torch.arange(8)), self._settings)
            print("SAMPLED", int(rollouts.tokens.sum()), flush=True)
        return runs

    OwnText._before_step = before_step


def repeated() -> None:
    from abkd_megatron.student.step import DistilledStep

    loss = DistilledStep._loss

    def asking(self: DistilledStep, *args: object, **kwargs: object) -> object:
        machine = get_rerun_state_machine()
        if machine.state is RerunState.INITIAL_RUN:
            machine.rerun_requested = True
        elif machine.state is RerunState.RERUNNING_IN_PLACE:
            machine.continue_requested = True
            print("REPEATED", self.is_own_text, flush=True)
        return loss(self, *args, **kwargs)

    DistilledStep._loss = asking


if __name__ == "__main__":
    what, folder, *words = sys.argv[1:]
    {"unused": unused, "repeated": repeated, "source": lambda: sys.path.append(folder)}[what]()
    sys.exit(command_line.main(words))
