"""Faults put into the package on purpose, one at a time, and the tests of `make test` that find them, run by hand.

    python tests/mutations.py          # all of them
    python tests/mutations.py KL mask  # those whose names contain one of these

Each fault is one edit of a copy of the tree. Some of the tests named for it, which pass without it, have to fail. The
result is a table of faults and of how many tests found each; the exit code is 1 if one was not found.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutation(NamedTuple):
    name: str
    file: str
    """Within the package."""
    old: str
    """It is there once."""
    new: str
    tests: str
    """Arguments of pytest."""


def matrix(row: str) -> str:
    """The rows of tests/host/test_matrix.py whose names contain this."""
    return f"tests/host/test_matrix.py -k 'trains_as_on_one_rank and {row}'"


HEAD = "tests/distributed/test_vocab_parallel.py -k 'ranks2 and dense_twin'"

MUTATIONS = [
    Mutation(
        "second exchange of records dropped",
        "vocab_parallel/passes.py",
        "self.records, self.work = all_gather(record, shard, async_op)",
        "pass",
        HEAD,
    ),
    Mutation(
        "gradient of alpha-beta with the wrong sign",
        "losses/alpha_beta.py",
        "return _difference(at_zero.exp(), at_alpha, a, log_ratio).neg_()",
        "return _difference(at_zero.exp(), at_alpha, a, log_ratio)",
        "tests/unit/test_divergences.py -k vectors",
    ),
    Mutation(
        "gradient not divided by the temperature",
        "kernels/eager.py",
        "(of_divergence.to(dtype) / temperature)",
        "(of_divergence.to(dtype))",
        "tests/unit/test_kernels.py -k cpp",
    ),
    Mutation(
        "cross entropy at the distillation temperature",
        "kernels/eager.py",
        "if q is None or temperature != 1.0:",
        "if q is None:",
        "tests/unit/test_kernels.py -k cpp",
    ),
    Mutation(
        "padded columns taken for tokens",
        "vocab_parallel/shard.py",
        "return cls(start, min((rank + 1) * width, vocab_size), vocab_size, group, width)",
        "return cls(start, start + width, padded_size, group, width)",
        HEAD,
    ),
    Mutation(
        "kd_weight ignored with logits",
        "student/head.py",
        "total = sum_of(term_weights, (distillation, terms.cross_entropy))",
        "total = sum_of((1.0, term_weights[1]), (distillation, terms.cross_entropy))",
        "tests/host/test_schedules.py",
    ),
    Mutation(
        "lm_weight ignored by the fused head",
        "vocab_parallel/head_function.py",
        "weighted(self.lm_weight, of_loss)",
        "of_loss",
        "tests/distributed/test_head.py -k ranks2",
    ),
    Mutation(
        "kept logits of other ranks taken for one's own",
        "vocab_parallel/record_passes.py",
        "torch.where(batch.owned[chunk], logits, 0.0)",
        "logits",
        "tests/distributed/test_sharded_records.py -k ranks2",
    ),
    Mutation(
        "a label among a record's rest has no gradient",
        "vocab_parallel/record_passes.py",
        "& ~is_kept",
        "& is_kept",
        "tests/unit/test_records.py -k gradcheck",
    ),
    Mutation(
        "teacher not frozen",
        "teacher/build.py",
        "module.requires_grad_(False)",
        "module.requires_grad_(True)",
        "tests/host/test_neutrality.py",
    ),
    Mutation(
        "no tensor-parallel group for the loss",
        "student/attach.py",
        "VocabShard.megatron(student.weight.shape[0], self._tp_group, self._vocab_size),",
        "VocabShard.megatron(student.weight.shape[0], None, min(self._vocab_size, student.weight.shape[0])),",
        matrix("TP"),
    ),
    Mutation(
        "pipeline stages begin a layer late",
        "config/stages.py",
        "first = get_transformer_layer_offset(config, vp_stage, stage) + 1",
        "first = get_transformer_layer_offset(config, vp_stage, stage) + 2",
        "tests/unit/test_stages.py",
    ),
    Mutation(
        "loss mask ignored",
        "student/report.py",
        "return torch.where(mask == 0, 0.0, per_token.reshape(-1).float() * mask).sum()",
        "return per_token.reshape(-1).float().sum()",
        "tests/host/test_step.py",
    ),
    Mutation(
        "teacher's queue reversed",
        "student/teacher_passes.py",
        "self._waiting.popleft()",
        "self._waiting.pop()",
        matrix("VPP"),
    ),
    Mutation(
        "every sequence has the default teacher",
        "teacher/teachers.py",
        "numbers = torch.where(sources == source, number, numbers)",
        "pass",
        "tests/host/test_several_teachers.py -k rank",
    ),
    Mutation(
        "the gradient from records at the tokens of live teachers",
        "vocab_parallel/mixed_passes.py",
        "own = torch.where(batch.recorded, here, 0.0)",
        "own = here",
        "tests/host/test_several_teachers.py -k 'cached and not 2'",
    ),
    Mutation(
        "KL divergences of live and cached teachers are means over all tokens",
        "student/cached.py",
        "if is_part else {}",
        "if False else {}",
        "tests/host/test_several_teachers.py -k rank",
    ),
    Mutation(
        "other teachers' hidden states in a sequence's logits",
        "teacher/output_layer.py",
        "own = torch.where((self.numbers == number).unsqueeze(-1), hidden, 0.0)",
        "own = hidden",
        "tests/host/test_several_teachers.py -k rank",
    ),
    Mutation(
        "checksums of the teacher's checkpoint not compared",
        "teacher/checksums.py",
        "is not None:\n                    raise CheckpointError(",
        "is not None and False:\n                    raise CheckpointError(",
        "tests/unit/test_checksums.py",
    ),
    Mutation(
        "spikes not looked for",
        "student/loss_guard.py",
        "        if spikes:\n",
        "        if False:\n",
        "tests/host/test_faults.py",
    ),
    Mutation(
        "schedule a step ahead",
        "losses/schedule.py",
        "share = (count - start) / (end - start)",
        "share = (count + 1 - start) / (end - start)",
        "tests/unit/test_schedule.py",
    ),
    Mutation(
        "selection of tokens inverted",
        "losses/selection.py",
        "return positions % self.n == self.n - 1",
        "return positions % self.n != self.n - 1",
        "tests/unit/test_token_selection.py",
    ),
    Mutation(
        "selection of tokens not applied to the divergence",
        "student/head.py",
        "terms = terms._replace(divergence=torch.where(trained, terms.divergence, 0.0))",
        "pass",
        matrix("some"),
    ),
    Mutation(
        "hidden loss takes another layer of the teacher",
        "student/hidden.py",
        "_layer(teacher.model, pair.loss.teacher_layer)",
        "_layer(teacher.model, pair.loss.student_layer)",
        "tests/host/test_hidden_losses.py",
    ),
    Mutation(
        "hidden loss not divided by the micro-batches",
        "student/added.py",
        "loss = loss / count.clamp(min=1) / get_num_microbatches()",
        "loss = loss / count.clamp(min=1)",
        "tests/host/test_hidden_losses.py",
    ),
    Mutation(
        "hidden loss not summed over sequence-parallel ranks",
        "student/hidden.py",
        "            dist.all_reduce(sums, group=self._tp_group)\n",
        "            pass\n",
        matrix("between and SP"),
    ),
    Mutation(
        "means over selected tokens divided by all tokens",
        "student/report.py",
        "counts = {name: counted_here.sum().clamp_min(NOTHING) for name, counted_here in of_some.items()}",
        "counts = dict.fromkeys(of_some, counted)",
        "tests/host/test_step.py",
    ),
    Mutation(
        "teacher inherits what is of the student's run",
        "teacher/inherited.py",
        "if kind_of(dest, groups[dest]) in (MODEL, SHARED):",
        "if kind_of(dest, groups[dest]) in (MODEL, SHARED, STUDENT):",
        "tests/unit/test_inherited.py",
    ),
    Mutation(
        "a replica of the teacher has all the work",
        "teacher/layout.py",
        "return (micro_batch * self.num_dp_replicas + dp_replica) % self.num_replicas",
        "return 0",
        "tests/host/test_teacher_layout.py",
    ),
    Mutation(
        "random state not put back",
        "teacher/build.py",
        "        torch.set_rng_state(states[2])\n        torch.cuda.set_rng_state(states[3])\n",
        "",
        "tests/host/test_neutrality.py",
    ),
    Mutation(
        "resumed with another teacher",
        "preflight/run_record.py",
        'if on_change == "refuse":',
        "if False:",
        "tests/host/test_provenance.py",
    ),
    Mutation(
        "gradient of padded columns left as it was",
        "vocab_parallel/passes.py",
        "out_rows[:, self.shard.num_columns :] = 0.0",
        "pass",
        HEAD,
    ),
    Mutation(
        "a model left without its head after an error",
        "teacher/model.py",
        "prepend=True, always_call=True",
        "prepend=True",
        "tests/host/test_model_output.py",
    ),
    Mutation(
        "losses of multi-token prediction dropped",
        "teacher/model.py",
        "config.mtp_num_layers is not None and model.mtp_process",
        "False",
        "tests/host/test_model_output.py",
    ),
]


def failed(tree: Path, tests: str) -> set[str]:
    """Return the ids of the tests that fail in this tree."""
    command = f"{sys.executable} -m pytest -q -rfE -p no:cacheprovider -m 'not slow' {tests}"
    # A shell's line, as a reader would type it.
    done = subprocess.run(command, shell=True, cwd=tree, capture_output=True, text=True)
    assert done.returncode in (0, 1), f"{tests}: nothing was run:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return set(re.findall(r"^(?:FAILED|ERROR) (tests/.*?)(?: - .*)?$", done.stdout, re.MULTILINE))


def main(names: list[str]) -> int:
    chosen = [it for it in MUTATIONS if not names or any(name in it.name for name in names)]
    missed = 0
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache"))
        for it in chosen:
            found = (tree / "abkd_megatron" / it.file).read_text().count(it.old)
            assert found == 1, f"{it.name}: {it.file} has {it.old!r} {found} times"
        before = {tests: failed(tree, tests) for tests in dict.fromkeys(it.tests for it in chosen)}
        print("| fault | tests | found by | seconds |\n|---|---|---|---|", flush=True)
        for it in chosen:
            path = tree / "abkd_megatron" / it.file
            text = path.read_text()
            path.write_text(text.replace(it.old, it.new))
            started = time.monotonic()
            try:
                found_by = failed(tree, it.tests) - before[it.tests]
            finally:
                path.write_text(text)
            missed += not found_by
            seconds = time.monotonic() - started
            print(f"| {it.name} | `{it.tests}` | {len(found_by) or 'NOT FOUND'} | {seconds:.0f} |", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
