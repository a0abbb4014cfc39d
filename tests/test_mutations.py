"Tests of the tests: each mistake of the table in mutations.py must be noticed"
import ast, subprocess, sys
from pathlib import Path
import pytest, torch
from mutations import ROWS, judge, mutated

def test_the_table_is_up_to_date():
    stale = [(r.file, r.old) for r in ROWS if mutated(r) is None]
    assert not stale, f'text that is not there exactly once: {stale}'
    assert len(ROWS) == len({(r.file, r.old) for r in ROWS}) >= 45
    for r in ROWS: assert r.old != r.new and ast.parse(mutated(r)) is not None

def test_what_is_not_there_is_stale():
    assert judge(ROWS[0]._replace(old='no such line')) == judge(ROWS[0]._replace(old='return')) == 'stale'

@pytest.mark.slow
def test_mistakes_are_noticed():
    "In a process of its own, as it forks; it fails below .9, and if a row is stale or a named test fails by itself"
    p = subprocess.run([sys.executable, Path(__file__).with_name('mutations.py')], capture_output=True, text=True)
    print(p.stdout)
    assert p.returncode == 0, p.stdout + p.stderr

# Two lines of the table whose tests stand here

def test_the_name_of_a_torn_tail_is_durable_before_the_tail_is_wiped(tmp_path):
    "The directory is synchronised after the file that keeps the tail was made, and before the log itself is touched"
    from chronomem.then.log import Disk, TraceLog
    who, calls = dict(owner='ada', fingerprint='m0'), []
    log = TraceLog.create(tmp_path/'a', dict(key=(8, 'float32')), capacity=16, **who)
    log.append(0., key=torch.zeros(3, 8)); log._drop()                # as a kill leaves it
    with open(tmp_path/'a'/'00000000.seg', 'r+b') as f: f.seek(4096+3*log.dtype.itemsize); f.write(b'torn')
    class Told(Disk):
        def pwrite(self, fd, data, offset): calls.append('write'); return super().pwrite(fd, data, offset)
        def fdatasync(self, fd): calls.append('sync'); super().fdatasync(fd)
        def fsync(self, fd): calls.append('sync directory'); super().fsync(fd)
    log = TraceLog.open(tmp_path/'a', **who, disk=Told())
    assert log.report.kept_in == '00000000.torn' and calls[:4] == ['write', 'sync', 'sync directory', 'write']
    log.close()

def test_a_state_is_saved_every_so_many_inferences(tmp_path, monkeypatch):
    from chronomem.live.session import Session
    from test_session import text, toy
    saved, save = [], Session.save
    monkeypatch.setattr(Session, 'save', lambda s: (saved.append(s.t), save(s)))
    with toy().session('ada', tmp_path/'home', save_every=3) as s:
        for i in range(7): s.ingest(text(i))
        assert saved == [3, 6] and s._new == 1
