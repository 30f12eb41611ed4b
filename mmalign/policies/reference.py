"""placeholder until the reference module lands"""
from mmalign.config import Options
class ReferenceOptions(Options):
    """x"""
class Reference:
    """x"""
def make_reference(policy, options):
    """x"""
    raise RuntimeError("placeholder")
