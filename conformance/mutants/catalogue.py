"""Every seeded fault, in the order of the report."""

from conformance.mutants.backward import BACKWARD
from conformance.mutants.data import DATA
from conformance.mutants.forward import FORWARD
from conformance.mutants.mutant import Mutant
from conformance.mutants.precision import PRECISION
from conformance.mutants.updates import UPDATES

MUTANTS: tuple[Mutant, ...] = (*FORWARD, *BACKWARD, *UPDATES, *DATA, *PRECISION)
