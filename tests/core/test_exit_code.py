"""The ends of a command."""

from big_ssl.core.command import exit_code
from big_ssl.core.types import UserError


def fail(error):
  raise error


def test_a_mistake_and_ctrl_c_are_one_line_each(capsys):
  assert exit_code(lambda: fail(UserError("config.x=1: no"))) == 2
  assert capsys.readouterr().err == "error: config.x=1: no\n"
  assert exit_code(lambda: fail(KeyboardInterrupt), interrupted="stopped") == 130
  assert capsys.readouterr().err == "stopped\n"


def test_a_command_gives_its_own_code_or_0():
  assert (exit_code(lambda: 3), exit_code(lambda: None)) == (3, 0)
