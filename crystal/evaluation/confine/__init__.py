"""Code that a language model wrote, run confined: no network, no file but its scratch folder's, bounded in every way.

run_program and run_programs are the calls, confinement() says what this kernel offers. A process of its own, the warden
(warden.py), forks a program's process, which gives up what it could do (inside.py: namespaces, another uid, limits,
Landlock, seccomp) and becomes a bare interpreter. check.py proves it, once, with a program that tries to get out.
"""

from crystal.evaluation.confine.outcome import Confinement, Limits, Outcome
from crystal.evaluation.confine.run import confinement, run_program, run_programs

__all__ = ["Confinement", "Limits", "Outcome", "confinement", "run_program", "run_programs"]
