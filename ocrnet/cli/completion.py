"""Scripts for shell completion, generated from the tables of commands and flags that the parser uses."""

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ocrnet.cli.flags import FLAGS, key_values
from ocrnet.config.loader import KEYS
from ocrnet.predict.writers import KINDS

SHELLS = ("bash", "zsh", "fish")

Command = Callable[[Sequence[str]], int]

# Values that are completed where a flag also accepts others.
EXAMPLES = {("train", "resume_ckpt"): ("auto",), ("predict", "save"): KINDS}


@dataclass(frozen=True)
class Option:
    """A flag of a command: its name, its help, the values or the files that complete it."""

    name: str
    help: str
    values: tuple[str, ...] = ()
    files: str | None = None  # suffix of the files to complete; empty: any file or folder; None: no files


def script(shell: str, commands: Mapping[str, Command], usage: str) -> str:
    """Return the completion script for a shell.

    Args:
        shell: One of `SHELLS`.
        commands: The function of each command.
        usage: The usage text, which has one line with a summary for each command.

    Returns:
        The script, to be evaluated by the shell.
    """
    table = {name: tuple(_options(name, command)) for name, command in commands.items()}
    summaries = {name: _command_summary(name, usage) for name in commands}
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](table, summaries)


def _options(name: str, command: Command) -> Iterator[Option]:
    """Yield the flags of a command from `FLAGS`, or from its --help output if it has its own parser."""
    if name == "completion":
        return
    flags = [flag for flag in FLAGS if name in flag.commands]
    for flag in flags:
        values = EXAMPLES.get((name, flag.name)) or flag.values
        number = flag.key is not None and KEYS[flag.key].type in (int, float)
        files = ".yml" if flag.name == "config" else None if number or values else ""
        yield Option(flag.name, flag.description, values, "" if flag.name == "resume_ckpt" else files)
    if flags:
        yield Option("set", "any config key, as KEY=VALUE; repeatable")
        return
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        command(["--help"])
    for name in dict.fromkeys(re.findall(r"--(\w+)", text.getvalue().partition("usage:")[2])):
        if name not in ("help", "debug", "ckpt_path"):
            yield Option(name, "", files="")


def _keys() -> dict[str, tuple[str, ...]]:
    """Return the config keys for ``--set``, each with its values if they can be listed."""
    return {key: key_values(key) for key in KEYS}


def _command_summary(name: str, usage: str) -> str:
    match = re.search(rf"^  {name} +(.+?)(?:  |$)", usage, re.MULTILINE)
    return match[1].strip() if match else ""


def _bash(table: Mapping[str, tuple[Option, ...]], summaries: Mapping[str, str]) -> str:
    cases, flags = [], []
    for name, options in table.items():
        flags.append(f"    {name}) words='{' '.join(f'--{option.name}' for option in options)} --help' ;;")
        for option in options:
            if option.values:
                cases.append(f"    '{name} --{option.name}') words='{' '.join(option.values)}' ;;")
            elif option.files:
                cases.append(f"    '{name} --{option.name}') ending='{option.files}' ;;")
    keys = _keys()
    values = [f"    {key}) words='{' '.join(values)}' ;;" for key, values in keys.items() if values]
    return f"""# Completion of ocrnet for bash.
_ocrnet() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command=${{COMP_WORDS[1]}}
  local words='' ending='' inside='' key='' i IFS=$' \\t\\n'
  COMPREPLY=()
  if (( COMP_CWORD == 1 )); then
    COMPREPLY=($(compgen -W '{" ".join(table)} --help' -- "$current"))
    return
  fi
  for (( i = 2; i < COMP_CWORD; i++ )); do
    case ${{COMP_WORDS[i]}} in --set) inside=yes ;; --*) inside='' ;; esac
  done
  if [[ $inside && $current == = ]]; then current='' key=$before
  elif [[ $inside && $before == = ]]; then key=${{COMP_WORDS[COMP_CWORD-2]}}
  fi
  if [[ $key ]]; then
    case $key in
{chr(10).join(values)}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
    [[ $words ]] || {{ compopt -o filenames; IFS=$'\\n'; COMPREPLY=($(compgen -f -- "$current")); }}
    return
  fi
  if [[ $inside && $current != -* ]]; then
    compopt -o nospace
    COMPREPLY=($(compgen -S = -W '{" ".join(keys)}' -- "$current"))
    return
  fi
  case "$command $before" in
{chr(10).join(cases)}
    'completion completion') words='{" ".join(SHELLS)}' ;;
  esac
  [[ $words || $ending || $current != -* ]] || case $command in
{chr(10).join(flags)}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
  if [[ $ending || ! $words || $before == --resume_ckpt ]]; then
    compopt -o filenames
    IFS=$'\\n'
    if [[ $ending ]]; then COMPREPLY+=($(compgen -d -- "$current"; compgen -f -X "!*$ending" -- "$current"))
    else COMPREPLY+=($(compgen -f -- "$current"))
    fi
  fi
}}
complete -F _ocrnet ocrnet
"""


def _zsh(table: Mapping[str, tuple[Option, ...]], summaries: Mapping[str, str]) -> str:
    def quoted(text: str) -> str:
        return re.sub(r"([\[\]:])", r"\\\1", text).replace("'", "'\\''")

    def spec(option: Option) -> str:
        if option.name == "set":
            return f"'*--set[{quoted(option.help)}]:*--*:KEY=VALUE:_ocrnet_keys'"
        action = f"({' '.join(option.values)})" if option.values else "_files" if option.files is not None else " "
        if option.files and not option.values:
            action = f'_files -g "*{option.files}(-.)"'
        return f"'--{option.name}[{quoted(option.help)}]:value:{action}'"

    lines = []
    for name, options in table.items():
        rest = "'1:shell:(bash zsh fish)'" if name == "completion" else "'*:file:_files'"
        lines.append(f"    {name}) _arguments {' '.join([*map(spec, options), rest])} ;;")
    commands = " ".join(f"'{name}:{quoted(text)}'" for name, text in summaries.items())
    values = [f"      {key}) compadd -- {' '.join(values)} ;;" for key, values in _keys().items() if values]
    return f"""#compdef ocrnet
# Completion of ocrnet for zsh.
_ocrnet_keys() {{
  local key=${{words[CURRENT]%%=*}}
  if compset -P '*='; then
    case $key in
{chr(10).join(values)}
      *) _files ;;
    esac
  else
    compadd -q -S = -- {" ".join(_keys())}
  fi
}}
_ocrnet() {{
  local -a commands=({commands})
  if (( CURRENT == 2 )); then
    _describe command commands
    return
  fi
  shift words
  (( CURRENT-- ))
  case $words[1] in
{chr(10).join(lines)}
  esac
}}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then _ocrnet "$@"; else compdef _ocrnet ocrnet; fi
"""


def _fish(table: Mapping[str, tuple[Option, ...]], summaries: Mapping[str, str]) -> str:
    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

    lines = ["# Completion of ocrnet for fish.", "complete -c ocrnet -e"]
    for name, options in table.items():
        lines.append(f"complete -c ocrnet -n __fish_use_subcommand -f -a {name} -d {quoted(summaries[name])}")
        when = f"complete -c ocrnet -n '__fish_seen_subcommand_from {name}'"
        for option in options:
            if option.name == "set":
                keys = [f"{key}={value}" for key, values in _keys().items() for value in values or [""]]
                arguments = f"-x -a {quoted(' '.join(keys))}"
            elif option.values:
                arguments = f"-{'r' if option.files == '' else 'x'} -a {quoted(' '.join(option.values))}"
            elif option.files:
                arguments = f"-x -a '(__fish_complete_suffix {option.files})'"
            else:
                arguments = "-x" if option.files is None else "-r"
            lines.append(f"{when} -l {option.name} {arguments} -d {quoted(option.help)}")
    lines.append(f"complete -c ocrnet -n '__fish_seen_subcommand_from completion' -f -a '{' '.join(SHELLS)}'")
    return "\n".join(lines) + "\n"
