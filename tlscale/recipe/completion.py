"""Completion of the command line in bash, zsh and fish: verbs, options, files, and the keys of a recipe.

Promise: nothing is imported that takes long (so this does not lie in `commands`, whose package imports torch); a
recipe's keys are read off its schema. click has the rest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ZshComplete,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)

_SHELLS = ("bash", "zsh", "fish")
_VARIABLE = "_TLSCALE_COMPLETE"  # click's

# As click's, but no space after what goes on, and files where nothing else is known.
_BASH = """\
%(complete_func)s() {
    local IFS=$'\\n' response type value
    response=$(env COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD=$COMP_CWORD %(complete_var)s=bash_complete $1)
    for completion in $response; do
        IFS=',' read -r type value <<< "$completion"
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain)
                [[ $value == *[=.] ]] && compopt -o nospace
                COMPREPLY+=("$value") ;;
        esac
    done
}
complete -o nosort -o bashdefault -o default -F %(complete_func)s %(prog_name)s
"""
_ZSH = """\
#compdef %(prog_name)s
%(complete_func)s() {
    local -a response whole open
    local type key descr found=1
    (( ! $+commands[%(prog_name)s] )) && return 1
    response=("${(@f)$(env COMP_WORDS="${words[*]}" COMP_CWORD=$((CURRENT-1)) \
%(complete_var)s=zsh_complete %(prog_name)s)}")
    for type key descr in "${(@)response}"; do
        case $type in
            dir) _path_files -/ && found=0 ;;
            file) _path_files -f && found=0 ;;
            plain) if [[ $key == *[=.] ]]; then open+=("$key"); else whole+=("$key"); fi ;;
        esac
    done
    (( $#whole )) && compadd -U -V unsorted -a whole && found=0
    (( $#open )) && compadd -U -V unsorted -S '' -a open && found=0
    return found
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    %(complete_func)s "$@"
else
    compdef %(complete_func)s %(prog_name)s
fi
"""
# As click's, but for a comma in a description, at which it would end.
_FISH = """\
function %(complete_func)s
    set -l response (env %(complete_var)s=fish_complete COMP_WORDS=(commandline -cp) \
COMP_CWORD=(commandline -t) %(prog_name)s)
    for completion in $response
        set -l metadata (string split --max 1 , $completion)
        switch $metadata[1]
            case dir
                __fish_complete_directories $metadata[2]
            case file
                __fish_complete_path $metadata[2]
            case plain
                echo $metadata[2]
        end
    end
end
complete --no-files --command %(prog_name)s --arguments "(%(complete_func)s)"
"""


@add_completion_class
class _Bash(BashComplete):
    """Put `key=value` together again, which bash takes for three words, and give it the last of them."""

    source_template = _BASH
    _known = ""

    def get_completion_args(self) -> tuple[list[str], str]:
        at = int(os.environ["COMP_CWORD"])
        words = split_arg_string(os.environ["COMP_WORDS"])[: at + 1]
        words += [""] * (at + 1 - len(words))
        joined = [""]
        for before, word in zip(["", *words], words, strict=False):
            if word == "=" or (before == "=" and word):
                joined[-1] += word
            else:
                joined.append(word)
        *args, incomplete = joined[2:] or [""]
        last = "" if words[-1] == "=" else words[-1]
        self._known = incomplete[: len(incomplete) - len(last)]
        return args, incomplete

    def format_completion(self, item: CompletionItem) -> str:
        return f"{item.type},{item.value.removeprefix(self._known)}"


@add_completion_class
class _Zsh(ZshComplete):
    source_template = _ZSH


@add_completion_class
class _Fish(FishComplete):
    source_template = _FISH


@click.command()
@click.argument("shell", type=click.Choice(_SHELLS))
def completion(shell: str) -> None:
    """Print what SHELL has to read in order to complete commands, options, files and the keys of a recipe.

    \b
    Examples:
      echo 'eval "$(tlscale completion bash)"' >> ~/.bashrc
      tlscale completion fish > ~/.config/fish/completions/tlscale.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None, "one of _SHELLS"
    click.echo(kind(click.get_current_context().find_root().command, {}, "tlscale", _VARIABLE).source(), nl=False)


def files(_context: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete a file or a folder."""
    return [CompletionItem(incomplete, type="file")]


def recipe_keys(_context: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete an override: a section (`optim.`), a key (`optim.lr=`), or one of the values that it takes."""
    key, equals, begun = incomplete.partition("=")
    if equals:
        return [CompletionItem(f"{key}={value}") for value in _values(key) if value.startswith(begun)]
    return [CompletionItem(name, help=about) for name, about in _names(key.count(".")) if name.startswith(key)]


def _names(depth: int) -> Iterator[tuple[str, str]]:
    """Yield `optim.` or `optim.lr=`, and what it is, of all keys below so many others."""
    from tlscale.recipe.schema_keys import all_keys

    lists = {key.path[:-1] for key in all_keys().values() if key.in_list}
    for key in all_keys().values():
        if len(key.path) == depth + 1 and not key.in_list:
            has_keys = key.section is not None and key.path not in lists
            yield f"{key.dotted}{'.' if has_keys else '='}", key.description


def _values(dotted: str) -> list[str]:
    """Return the values of a key that takes one of a few."""
    from typing import Literal, get_args, get_origin

    from tlscale.recipe.schema_keys import all_keys, members_of

    key = all_keys().get(dotted)
    if key is None:
        return []
    members = members_of(key.field.annotation)
    named = [str(value) for member in members if get_origin(member) is Literal for value in get_args(member)]
    return [*named, *(["true", "false"] if bool in members else [])]
