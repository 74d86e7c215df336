"""Instructions of a compiled Triton kernel, counted on the path that most columns take."""

import heapq
import re
import subprocess
from collections import Counter
from pathlib import Path

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"\s*(\.L_\S+):")


def tools():
    """The directory of NVIDIA's binary tools that come with Triton."""
    from triton import backends

    return Path(backends.__file__).parent / "nvidia" / "bin"


def described(cubin, folder):
    """Of a binary: registers, bytes of local memory, and what is on the path that most columns take.

    It is the shortest around a loop that loads and takes exponentials, or through the kernel if there is no such loop:
    full tiles, no new maximum, no label in the tile.
    """
    path = Path(folder) / "kernel.cubin"
    path.write_bytes(cubin)
    run = {"capture_output": True, "text": True, "check": True}
    usage = subprocess.run([tools() / "cuobjdump", "--dump-resource-usage", path], **run).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    text = subprocess.run([tools() / "nvdisasm", "-c", path], **run).stdout
    return {"registers": registers, "local": stack + local, **counted(path_of(text))}


def counted(instructions):
    words = [re.sub(r"^@!?U?P\w+\s+", "", line).split()[0] for line in instructions]
    counts = Counter(word.split(".")[0] for word in words)
    return {
        "instructions": len(words) - counts["NOP"],
        "loads": sorted({word for word in words if word.startswith("LDG")}),
        "stores": sorted({word for word in words if word.startswith("STG")}),
        "exponentials": sum(word.startswith("MUFU.EX2") for word in words),
        "barriers": counts["BAR"],
        "shuffles": counts["SHFL"],
    }


def path_of(text):
    """The instructions of that path."""
    blocks, after = graph(text)
    place = {name: at for at, name in enumerate(blocks)}
    loops = {to for name in blocks for to in after[name] if to in place and place[to] <= place[name]}
    around = [shortest(blocks, after, start, start) for start in loops]
    around = [path for path in around if all(any(word in line for line in path) for word in ("LDG", "MUFU.EX2"))]
    return min(around, key=len) if around else shortest(blocks, after, next(iter(blocks)), "exit")


def graph(text):
    """Basic blocks by name, and the names of those that may follow."""
    blocks, name = {}, "entry"
    blocks[name] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            blocks[name := label[1]] = []
        elif found := _INSTRUCTION.search(line):
            blocks[name].append(found[1])
            if re.search(r"\b(BRA|EXIT)\b", found[1]):
                blocks[name := f"{name}+"] = []
    after, names = {}, [*blocks, "exit"]
    for name, following in zip(blocks, names[1:], strict=True):
        last = blocks[name][-1] if blocks[name] else ""
        conditional = re.match(r"@|BRA\.(DIV|CONV)|BRA\S*\s+!?U?P\d", last)  # threads that diverge, or a predicate
        after[name] = [following] if conditional or not re.search(r"\b(BRA|EXIT)\b", last) else []
        if "EXIT" in last:
            after[name].append("exit")
        elif target := re.search(r"\bBRA\b.*`\((\.L_\S+?)\)", last):
            after[name].append(target[1])
    return blocks, after


def shortest(blocks, after, start, goal):
    """The instructions of the path with the fewest, from the block `start` to `goal`, [] if there is none."""
    queue, seen = [(len(blocks[start]), start, (start,))], set()
    while queue:
        length, name, path = heapq.heappop(queue)
        if name in seen:
            continue
        seen.add(name)
        for to in after[name]:
            if to == goal:
                return [line for one in path for line in blocks[one]]
            if to in blocks and to not in seen:
                heapq.heappush(queue, (length + len(blocks[to]), to, (*path, to)))
    return []
