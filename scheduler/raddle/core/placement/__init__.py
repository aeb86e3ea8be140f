"""Where jobs run: gangs are placed whole or not at all, with a reason."""
