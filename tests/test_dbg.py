import sys; sys.path.insert(0, "tests")
from test_loop import *
def test_dbg(steps, home):
    a=run_loop(); marks=[r.fingerprint for r in a.steps]
    from nbs_lib.settings import load_settings
    s=load_settings(); t=open_tracker(s); st=loops.STEPS
    print([loops.fingerprint(x, x.notebook, {"recipe":"faces"}, s, t)==m for x,m in zip(st,marks)])
    print(a.steps[0].outputs, [bool(t.resolve(r)) for r in a.steps[0].outputs], runs.last_success(st[0].notebook, recipe="faces"))
    assert 0
