"""Completion in bash and zsh: jobs, options, YAML files, and keys with the values of those that have names.

The script is made once, from the parser and the dataclasses, so that a key press starts no Python. Megatron's own
arguments are not in it: their names are known to Megatron alone, which takes seconds to import.
"""

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import fields

from abkd_megatron.config.schema import (
    DEVICES,
    HEADS,
    KERNELS,
    TEACHER_KEYS,
    CompareConfig,
    DataConfig,
    DistillationConfig,
)
from abkd_megatron.losses.registry import DIVERGENCES, LOGIT_LOSSES

# Sections whose keys are Megatron's end in the dot.
_KEYS = (
    "device",
    "megatron.",
    "teacher.",
    *(f"teacher.{key}" for key in TEACHER_KEYS),
    *(
        f"{section}.{item.name}"
        for section, kind in (("distillation", DistillationConfig), ("data", DataConfig), ("compare", CompareConfig))
        for item in fields(kind)
    ),
)
_VALUES: Mapping[str, Iterable[str]] = {
    "device": DEVICES,
    "distillation.divergence": (*DIVERGENCES, *LOGIT_LOSSES),
    "distillation.kernel": KERNELS,
    "distillation.head": HEADS,
    "teacher.declared": ("true", "false"),
    **{
        f"distillation.{item.name}": ("true", "false")
        for item in fields(DistillationConfig)
        if isinstance(item.default, bool)
    },
}

_BASH = r"""# Completion of @prog@ in bash; written by `@prog@ completion bash`.
_abkd_megatron() {
    local line=${COMP_LINE:0:COMP_POINT} job= config= previous= words= word known
    word=${line##*[[:space:]]}
    for known in ${line%"$word"}; do
        case $known in
            *@prog@|-*|*=*) ;;
            *) if [[ -z $job ]]; then job=$known; elif [[ $previous != --* ]]; then config=$known; fi ;;
        esac
        previous=$known
    done
    COMPREPLY=()
    case $job in
        "") words="@jobs@" ;;
@options@
    esac
    case $word in
        -*) ;;
        *=*)
            case ${word%%=*} in
@values@
                *) words= ;;
            esac
            # Readline takes the word to begin behind the `=`, unless somebody took that out of COMP_WORDBREAKS.
            [[ $COMP_WORDBREAKS == *=* ]] || words=$(compgen -P "${word%%=*}=" -W "$words")
            [[ $COMP_WORDBREAKS == *=* ]] && word=${word#*=}
            if [[ -z $words ]]; then
                compopt -o filenames 2>/dev/null
                while IFS= read -r known; do COMPREPLY+=("$known"); done < <(compgen -f -- "$word")
                return
            fi ;;
        *)
            case $previous in
                --config) words= ;;
                --*) return ;;
            esac
            case $job in
                @takes@)
                    [[ -n $config ]] || while IFS= read -r known; do
                        case $known in
                            .*) [[ $word == .* ]] || continue ;;
                        esac
                        if [[ -d $known ]]; then COMPREPLY+=("$known/"); fi
                        case $known in *.yaml|*.yml) COMPREPLY+=("$known") ;; esac
                    done < <(compgen -f -- "$word")
                    [[ $previous == --config ]] || words="@keys@"
                    compopt -o nospace 2>/dev/null ;;
            esac ;;
    esac
    COMPREPLY+=($(compgen -W "$words" -- "$word"))
}
complete -o default -F _abkd_megatron @prog@
"""

_ZSH = r"""#compdef @prog@
# Completion of @prog@ in zsh; written by `@prog@ completion zsh`. Needs compinit.
_abkd_megatron() {
    local job= config= previous= known
    for known in ${words[2,CURRENT-1]}; do
        case $known in
            -*|*=*) ;;
            *) if [[ -z $job ]]; then job=$known; elif [[ $previous != --* ]]; then config=$known; fi ;;
        esac
        previous=$known
    done
    local -a words_of
    case $job in
        "") words_of=(@jobs@) ;;
@options@
    esac
    case $PREFIX in
        -*) ;;
        *=*)
            local key=${PREFIX%%=*}
            compset -P '*='
            case $key in
@values@
                *) _files; return ;;
            esac ;;
        *)
            case $previous in
                --config) _files -g '*.y(a|)ml'; return ;;
                --*) return ;;
            esac
            case $job in
                @takes@)
                    [[ -n $config ]] || _files -g '*.y(a|)ml'
                    compadd -S '' -- @keys@
                    return ;;
            esac ;;
    esac
    compadd -- $words_of || _files
}
compdef _abkd_megatron @prog@
"""


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script that completes the command line.

    Args:
        parser: of the whole command line, its jobs as sub-parsers.
        shell: "bash" or "zsh".

    Returns:
        Text for the shell to evaluate.
    """
    (jobs,) = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    options = {name: [*_options(job), *_positional(job)] for name, job in jobs.items()}
    takes = [name for name, words in options.items() if "--config" in words]
    keys = [key if key.endswith(".") else f"{key}=" for key in _KEYS]
    list_of = "words_of=({})" if shell == "zsh" else 'words="{}"'
    parts = {
        "prog": parser.prog,
        "jobs": " ".join([*jobs, *_options(parser)]),
        "options": _cases({name: list_of.format(" ".join(words)) for name, words in options.items()}, 8),
        "values": _cases({key: list_of.format(" ".join(values)) for key, values in _VALUES.items()}, 16),
        "takes": "|".join(takes),
        "keys": " ".join(keys),
    }
    text = _ZSH if shell == "zsh" else _BASH
    for name, part in parts.items():
        text = text.replace(f"@{name}@", part)
    return text


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return [option for action in parser._actions for option in action.option_strings]


def _positional(parser: argparse.ArgumentParser) -> list[str]:
    """Words that may stand without a dash."""
    choices = (action.choices for action in parser._actions if action.choices and not action.option_strings)
    return [str(choice) for of in choices for choice in of]


def _cases(commands: Mapping[str, str], indent: int) -> str:
    return "\n".join(f"{' ' * indent}{name}) {command} ;;" for name, command in commands.items())
