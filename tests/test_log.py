"""What a notebook can't say about `chronomem.then.log`: processes killed at random, disks torn at every byte, and copies of
the code broken on purpose, to show that these checks can fail."""
import errno, os, random, resource, shutil, signal, sys, time
import pytest, torch
from chronomem.core import StateError
from chronomem.then import log as L, segments
from chronomem.then.log import Disk, TraceLog, wipe_log

FIELDS = dict(key=(8, 'float16'), value=((2, 20), 'float32'))
WHO = dict(owner='ada', fingerprint='m0')
W = L.record_dtype(FIELDS).itemsize

def rows(lo, hi):
    "What record i must hold, computable from i alone"
    i = torch.arange(lo, hi, dtype=torch.float32)
    return dict(key=(i[:, None] % 97 + torch.arange(8)).half(), value=i[:, None, None]*3 + torch.arange(40.).view(2, 20))

def put(log, n): return log.append(torch.arange(len(log), len(log)+n)*.5, **rows(len(log), len(log)+n))
def new(d, n=0, **kw):
    log = TraceLog.create(d, FIELDS, **WHO, **{**dict(capacity=16), **kw})
    if n: put(log, n)
    return log
def reopen(d, **kw): return TraceLog.open(d, **WHO, **kw)
def die(log): log._drop()                                          # as SIGKILL leaves it: no mark, no goodbye

def wrong(log):
    "Records that are served as good, but aren't what was written"
    if not len(log): return []
    got, want = log.read(range(len(log)), bad='mask'), rows(0, len(log))
    same = (got.key == want['key']).all(1) & (got.value == want['value']).flatten(1).all(1) & (got.time == torch.arange(len(log))*.5)
    return (got.valid & ~same).nonzero().flatten().tolist()

def opened(d, **kw):
    try: return reopen(d, **kw)
    except StateError: return None

# ---- kill -9

def writer(d, broken):
    "A child that appends and acknowledges until it is killed"
    if pid := os.fork(): return pid
    try:
        held, real = [], TraceLog._commit
        if broken: TraceLog._commit = lambda self, seg, rec: held.append((seg, rec.copy()))    # acknowledges first, writes later
        log, rng = reopen(d), random.Random(os.getpid())
        with open(f'{d}.ack', 'a') as out:
            while True:
                put(log, rng.randrange(1, 40)); out.write(f'{len(log)}\n'); out.flush()
                if len(held) > 3: [real(log, *h) for h in held]; held.clear()
    finally: os._exit(1)

def kill_rounds(tmp, rounds, broken=False):
    "Kill a writer `rounds` times: acknowledged records lost or wrong, records kept, kills inside an append"
    rng, lost, kept, inside = random.Random(0), 0, 0, 0
    for r in range(rounds):
        d = tmp/f'k{r//8}'; ack = tmp/f'k{r//8}.ack'               # eight lives in a row for each log
        if not d.exists(): new(d).close(); ack.write_text('0\n')
        before, end, pid = ack.stat().st_size, time.monotonic()+20, writer(d, broken)
        while ack.stat().st_size == before and time.monotonic() < end: time.sleep(.001)
        time.sleep(rng.random()*.05)
        os.kill(pid, signal.SIGKILL); assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        acked, log = int(ack.read_text().split()[-1]), reopen(d)
        lost += max(0, acked-len(log)) + len(wrong(log)) + len(log.verify().damaged)
        kept += len(log)*(r % 8 == 7 or r == rounds-1); inside += len(log) > acked or log.report.cut_bytes > 0
        if broken: ack.write_text(f'{len(log)}\n')
        die(log)
    return lost, kept, inside

def test_kill_9(tmp_path):
    lost, kept, inside = kill_rounds(tmp_path, 80)
    print(f'80 kills: {lost} acknowledged records lost of {kept}; {inside} kills fell between write and acknowledgement')
    assert lost == 0 and kept > 500 and inside > 0

def test_broken_copy_ack_before_write(tmp_path):
    assert kill_rounds(tmp_path, 8, broken=True)[0] > 0

# ---- torn tails and flipped bits

def test_torn_tail_at_every_byte(tmp_path):
    log = new(tmp_path/'a', 5); put(log, 1); die(log)
    seg = (tmp_path/'a'/'00000000.seg').read_bytes()
    at = 4096 + 5*W
    for cut in range(W):
        for image in (seg[:at+cut], seg[:at+cut] + bytes(len(seg)-at-cut))[:2 if cut % 4 == 0 else 1]:  # too short; bytes that never came
            d = tmp_path/'t'; d.mkdir(mode=0o700); (d/'00000000.seg').write_bytes(image)
            log = reopen(d)
            whole = image[at:at+W] == seg[at:at+W]                  # its last bytes were zeros anyway
            assert len(log) == 5+whole and not wrong(log), cut
            torn = image[at+whole*W:].rstrip(b'\0')
            assert log.report.cut_bytes == len(torn) and (not torn or (d/'00000000.torn').read_bytes() == torn)
            if cut % 8: die(log); shutil.rmtree(d); continue
            put(log, 2); die(log); log = reopen(d)
            assert len(log) == 7+whole and not wrong(log) and not log.verify().damaged
            log.wipe()

def flips(tmp, n, seed=0):
    "Flip one bit `n` times somewhere in a log of three segments; wrong records served, times refused, records lost to damage"
    log = new(tmp/'a', 60); log.close()
    files = sorted((tmp/'a').glob('*.seg'))
    assert len(files) == 3
    rng, bad, refused, hurt = random.Random(seed), 0, 0, 0
    for i in range(n):
        f = rng.choice(files); image = f.read_bytes()
        at = rng.randrange(4096 if i % 8 == 0 else 4096+16*W); bit = 1 << rng.randrange(8)
        f.write_bytes(image[:at] + bytes([image[at] ^ bit]) + image[at+1:])
        try:
            if (log := opened(tmp/'a', mode='r')) is None: refused += 1
            else: bad += len(wrong(log)); hurt += 60-log.verify().valid; log.close()
        finally: f.write_bytes(image)
    return bad, refused, hurt

def test_bit_flips(tmp_path):
    bad, refused, hurt = flips(tmp_path, 500)
    assert bad == 0 and refused == 0 and 150 < hurt <= 500

def test_broken_copy_no_checksum(tmp_path, monkeypatch):
    monkeypatch.setattr(L, 'check', lambda rec, seqs, tag: (rec['seq'] == seqs) & (rec['tag'] == tag).all(-1))
    assert flips(tmp_path, 200)[0] > 30

def test_header_flips_everywhere(tmp_path):
    new(tmp_path/'a', 4).close(); f = tmp_path/'a'/'00000000.seg'; image = f.read_bytes()
    for at in range(0, 4096, 17):                                   # one copy hurt: opens; both: refused
        f.write_bytes(image[:at] + bytes([image[at] ^ 16]) + image[at+1:])
        log = reopen(tmp_path/'a', mode='r'); assert len(log) == 4 and not wrong(log); log.close()
        o = (at+2048) % 4096; both = bytearray(image); both[at] ^= 16; both[o] ^= 1; f.write_bytes(both)
        assert opened(tmp_path/'a', mode='r') is None

# ---- a record in the wrong place, of another owner, a stale one

def test_swapped_and_foreign_records(tmp_path):
    new(tmp_path/'a', 8).close(); new(tmp_path/'b', 8).close()
    f, g = (tmp_path/x/'00000000.seg' for x in 'ab'); image = f.read_bytes()
    at = lambda i: slice(4096+i*W, 4096+(i+1)*W)
    two = bytearray(image); two[at(2)], two[at(3)] = image[at(3)], image[at(2)]; f.write_bytes(two)
    with reopen(tmp_path/'a') as log: assert log.verify().damaged == [2, 3] and not wrong(log)
    other = bytearray(image); other[at(4)] = g.read_bytes()[at(4)]; f.write_bytes(other)
    with reopen(tmp_path/'a') as log: assert log.verify().damaged == [4]

def test_broken_copy_no_sequence(tmp_path, monkeypatch):
    monkeypatch.setattr(L, 'check', lambda rec, seqs, tag: (L._crcs(rec) == rec['crc']) & (rec['tag'] == tag).all(-1))
    with pytest.raises(AssertionError): test_swapped_and_foreign_records(tmp_path)

class Recorder(Disk):
    def __init__(self): self.calls = []
    def pwrite(self, fd, data, offset):
        self.calls.append((os.readlink(f'/proc/self/fd/{fd}'), bytes(data), offset)); return super().pwrite(fd, data, offset)

def sector_images(tmp, images):
    "Power fails inside an append: any subset of its unsynced 512-byte sectors reached the disk"
    rng, errors, kept = random.Random(1), 0, 0
    disk = Recorder(); log = new(tmp/'a', disk=disk); put(log, 3); put(log, 4)
    image = (tmp/'a'/'00000000.seg').read_bytes(); disk.calls.clear()
    put(log, 6); die(log)
    for _ in range(images):
        d = tmp/'s'; d.mkdir(mode=0o700); now = bytearray(image)
        for _, data, off in disk.calls:
            for a in range(off - off % 512, off+len(data), 512):
                lo, hi = max(a, off), min(a+512, off+len(data))
                if rng.random() < .7: now.extend(bytes(max(0, hi-len(now)))); now[lo:hi] = data[lo-off:hi-off]
        (d/'00000000.seg').write_bytes(now)
        log = reopen(d); n = len(log); kept += n-7
        errors += n < 7 or bool(wrong(log))
        put(log, 1); die(log); log = reopen(d)                      # nothing stale may rise from behind the cut
        errors += len(log) != n+1 or bool(wrong(log)); log.wipe()
    return errors, kept

def test_unsynced_sectors(tmp_path):
    errors, kept = sector_images(tmp_path, 100)
    assert errors == 0 and kept > 0

def test_broken_copy_sectors_without_checksum(tmp_path, monkeypatch):
    monkeypatch.setattr(L, 'check', lambda rec, seqs, tag: (rec['seq'] == seqs) & (rec['tag'] == tag).all(-1))
    assert sector_images(tmp_path, 40)[0] > 0

def test_damage_below_the_watermark_is_not_a_tail(tmp_path):
    log = new(tmp_path/'a', 4); put(log, 4); put(log, 4); die(log)
    with open(tmp_path/'a'/'00000000.seg', 'r+b') as f: f.seek(4096+2*W+90); f.write(b'\xff\xff')
    log = reopen(tmp_path/'a')
    assert log.report.damaged == [2] and len(log) == 12 and log.report.cut_bytes == 0 and log.verify().valid == 11
    assert [b.valid.sum().item() for b in log.blocks(4)] == [3, 4, 4]
    with pytest.raises(StateError, match='record 2'): log[2]

def test_truncated_sealed_segment(tmp_path):
    log = new(tmp_path/'a', 60); log.close()
    os.truncate(tmp_path/'a'/'00000001.seg', 4096+5*W+30)
    log = reopen(tmp_path/'a'); assert log.verify().damaged == list(range(21, 48)) and not wrong(log)
    os.truncate(tmp_path/'a'/'00000001.seg', 4096)                 # under our feet, after it was mapped
    assert len(log.verify().damaged) == 32

# ---- strangers

def test_garbage_refused(tmp_path):
    rng = random.Random(2)
    for i in range(200):
        d = tmp_path/f'g{i}'; d.mkdir(); f = d/'00000000.seg'
        f.write_bytes(rng.choice([b'', L.MAGIC, b'\x80\x04\x95'])+rng.randbytes(rng.choice([0, 10, 2047, 4096, 9000])))
        for mode in 'ar':
            with pytest.raises(StateError): reopen(d, mode=mode)
    for bad in ([], 'x', {}, {'version': 1, 'endian': sys.byteorder}, {'version': 1, 'endian': sys.byteorder, 'fields': 3}):
        f.write_bytes(L.pack_header(bad))
        with pytest.raises(StateError): reopen(d)

def test_wrong_owner_model_type_shape(tmp_path):
    new(tmp_path/'a', 3).close()
    for who in (dict(owner='eve', fingerprint='m0'), dict(owner='ada', fingerprint='m1'), dict(owner='', fingerprint='')):
        with pytest.raises(StateError): TraceLog.open(tmp_path/'a', **who)
    with reopen(tmp_path/'a') as log:
        for bad in (dict(key=torch.zeros(1, 8)), dict(key=torch.zeros(1, 9).half()), dict(key=torch.full((1, 8), float('nan')).half()),
                    dict(key=torch.zeros(2, 8).half()), dict(key=None), dict(other=torch.zeros(1))):
            with pytest.raises(StateError): log.append(9., **{**rows(0, 1), **bad})
        for t in (float('nan'), float('inf'), [9., 9.], 0.):
            with pytest.raises(StateError): log.append(t, **rows(0, 1))
        assert len(log) == 3
    for call in (lambda: log.append(9., **rows(0, 1)), lambda: log[0], lambda: log.find(0.), lambda: log.verify(), lambda: log.pointer(0), lambda: log.wipe()):
        with pytest.raises(StateError, match='closed'): call()
    with pytest.raises(StateError): new(tmp_path/'a')

def test_one_writer_many_readers(tmp_path):
    log = new(tmp_path/'a', 5)
    if not (pid := os.fork()):                                      # another process: no second writer, but a reader
        ok = opened(tmp_path/'a') is None and len(reopen(tmp_path/'a', mode='r')) == 5
        os._exit(not ok)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    readers = [reopen(tmp_path/'a', mode='r') for _ in range(5)]
    assert all(not wrong(r) for r in readers)
    with pytest.raises(StateError, match="mode='r'"): readers[0].append(9., **rows(5, 6))
    with pytest.raises(StateError, match="mode='r'"): readers[0].wipe()
    put(log, 40); assert len(readers[0]) == 5 and not wrong(readers[0])

def test_forked_child_may_not_write_and_keeps_its_hands_off_the_lock(tmp_path):
    log = new(tmp_path/'a', 5)
    if not (pid := os.fork()):
        try: put(log, 1); code = 1
        except StateError: log.close(); code = 0
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert opened(tmp_path/'a') is None                             # still ours
    put(log, 1); assert not wrong(log)

# ---- disks that fail

class Failing(Disk):
    "Fail the n-th call of one kind; writes may be cut short first"
    def __init__(self, kind, n, err=errno.ENOSPC): self.kind, self.n, self.err = kind, n, err
    def _hit(self, kind):
        if kind == self.kind: self.n -= 1
        if kind == self.kind and self.n < 0: raise OSError(self.err, os.strerror(self.err))
    def pwrite(self, fd, data, offset):
        if self.kind == 'pwrite' and self.n == 0 and len(data) > 1: super().pwrite(fd, data[:len(data)//2], offset)
        self._hit('pwrite'); return super().pwrite(fd, data, offset)
    def fdatasync(self, fd): self._hit('fdatasync'); super().fdatasync(fd)
    def fsync(self, fd): self._hit('fsync'); super().fsync(fd)
    def rename(self, *a): self._hit('rename'); super().rename(*a)

@pytest.mark.parametrize('kind', ['pwrite', 'fdatasync', 'fsync', 'rename'])
def test_errors_surface_and_nothing_acknowledged_is_lost(tmp_path, kind):
    for n in range(12 if kind in ('pwrite', 'fdatasync') else 5):
        log = new(tmp_path/'a', 10); log.disk = Failing(kind, n); acked = 10
        with pytest.raises(OSError):
            while acked < 2000: put(log, 7); acked += 7
        assert len(log) == acked and not wrong(log)
        with pytest.raises(StateError, match='stopped'): put(log, 1)
        log.close(); log = reopen(tmp_path/'a')
        assert len(log) >= acked and not wrong(log) and not log.verify().damaged
        put(log, 30); log.close(); log = reopen(tmp_path/'a'); assert not wrong(log) and log.verify().valid == len(log); log.wipe()

def test_short_writes(tmp_path):
    class Short(Disk):
        def pwrite(self, fd, data, offset): return super().pwrite(fd, data[:1+len(data)//3], offset)
    log = new(tmp_path/'a', 30, disk=Short()); log.close()
    with reopen(tmp_path/'a') as log: assert len(log) == 30 and not wrong(log)

def test_full_disk_for_real(tmp_path):
    log, acked = new(tmp_path/'a', 5, capacity=4000), 5
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(OSError):
            while acked < 4000: put(log, 50); acked += 50
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 100 < acked == len(log) and not wrong(log); log.close()
    log = reopen(tmp_path/'a'); assert len(log) >= acked and not wrong(log)
    put(log, 100); assert not wrong(log)

def test_failed_sync_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(TraceLog, '_undo', lambda self, had: None)  # killed before it could take the batch back
    log = new(tmp_path/'a', 3); log.disk = Failing('fdatasync', 0, errno.EIO)
    with pytest.raises(OSError): put(log, 2)
    log.close(); disk = Recorder(); log = reopen(tmp_path/'a', disk=disk)
    assert len(log) == 5 and [(len(data), off) for _, data, off in disk.calls] == [(2*W, 4096+3*W)]

@pytest.mark.parametrize('kind', ['fdatasync', 'fsync', 'rename'])
@pytest.mark.parametrize('n', range(4))
def test_a_failed_append_is_taken_back(tmp_path, kind, n):
    "So that repeating it doesn't keep it twice"
    log = new(tmp_path/'a', 10); log.disk = Failing(kind, n); acked = 10
    with pytest.raises(OSError):
        while True: put(log, 50); acked += 50
    die(log); log = reopen(tmp_path/'a')
    assert len(log) == acked and not wrong(log) and log.report.cut_bytes == 0
    put(log, 50); die(log); log = reopen(tmp_path/'a')
    assert len(log) == acked+50 and not wrong(log) and not log.verify().damaged

def test_torn_bytes_are_safe_before_they_are_overwritten(tmp_path):
    log = new(tmp_path/'a', 5); die(log)
    with open(tmp_path/'a'/'00000000.seg', 'r+b') as f: f.seek(4096+5*W); f.write(b'torn')
    calls = []
    class Noting(Disk):
        def pwrite(self, fd, data, offset): calls.append(os.path.basename(os.readlink(f'/proc/self/fd/{fd}'))); return super().pwrite(fd, data, offset)
        def fsync(self, dir): calls.append('directory'); super().fsync(dir)
    reopen(tmp_path/'a', disk=Noting()).close()
    assert calls[:3] == ['00000000.torn', 'directory', '00000000.seg']

# ---- retention

def kept(log):
    "Records that are wrong, of those that are kept"
    got, want = log.read(range(log.first, len(log)), bad='mask'), rows(log.first, len(log))
    return (~got.valid).sum() + (got.key != want['key']).sum() + (got.time != torch.arange(log.first, len(log))*.5).sum()

def test_random_cuts_and_drops_agree_with_a_list(tmp_path):
    rng, log, n, low = random.Random(5), new(tmp_path/'a', capacity=4, largest=4096+9*W), 0, 0
    for step in range(200):
        k = rng.choice([0, 1, 3, 11]); put(log, k); n += k
        if rng.random() < .2: n = rng.randint(max(log.first, n-9), n); log.cut(n)
        if rng.random() < .2:
            before = rng.randint(0, n+2); gone = log.drop(before)
            assert log.first == low+gone <= max(before, low) and (before < n or log.first == n or gone == 0); low = log.first
        if rng.random() < .2: (die if rng.random() < .5 else TraceLog.close)(log); log = reopen(tmp_path/'a', largest=4096+9*W)
        assert (len(log), log.first) == (n, low) and not kept(log)
        assert sum(f.stat().st_size for f in (tmp_path/'a').glob('*.seg')) <= sum(HEAD+(s.end-s.first+1)*W for s in log.segs)
    assert low > 50
HEAD = 4096

@pytest.mark.parametrize('kind', ['unlink', 'rename', 'fsync', 'pwrite'])
@pytest.mark.parametrize('before', [30, 60])
def test_a_drop_that_fails_anywhere_can_be_repeated(tmp_path, kind, before):
    class Dying(Failing):
        def unlink(self, path): self._hit('unlink'); super().unlink(path)
    for n in range(6):
        log = new(tmp_path/'a', 60, largest=4096+9*W); log.disk = Dying(kind, n)
        try: log.drop(before); done = True
        except OSError: done = False
        die(log); log = reopen(tmp_path/'a')
        assert len(log) == 60 and log.first in (0, 24, 60)[:2+(before == 60)] and not kept(log)
        if not done: log.drop(before)
        assert log.first == (24 if before == 30 else 60); put(log, 3); assert not kept(log)
        assert sorted(p.name for p in (tmp_path/'a').iterdir() if p.suffix == '.seg') == [f'{s.number:08d}.seg' for s in log.segs]
        log.wipe()

def test_a_floor_of_nobody_is_refused(tmp_path):
    log = new(tmp_path/'a', 60); log.drop(40); log.close(); f = tmp_path/'a'/'floor.json'; image = f.read_bytes()
    for at in range(len(image)):
        f.write_bytes(image[:at] + bytes([image[at] ^ 1]) + image[at+1:])
        assert opened(tmp_path/'a', mode='r') is None
    f.unlink(); assert opened(tmp_path/'a', mode='r') is None
    f.write_bytes(image); assert not kept(reopen(tmp_path/'a'))

# ---- privacy

@pytest.mark.parametrize('mask', [0, 0o777])
def test_modes_under_any_umask(tmp_path, mask):
    old = os.umask(mask)
    try:
        log = new(tmp_path/'x'/'y'/'a', 40); die(log)
        with open(tmp_path/'x'/'y'/'a'/'00000001.seg', 'r+b') as f: f.seek(4096+28*W); f.write(b'torn')
        log = reopen(tmp_path/'x'/'y'/'a'); assert log.report.kept_in == '00000001.torn'
    finally: os.umask(old)
    for root, _, files in os.walk(tmp_path/'x'):
        assert os.stat(root).st_mode & 0o777 == 0o700
        for f in files: assert f == '.lock' and mask or os.stat(os.path.join(root, f)).st_mode & 0o777 == 0o600, f   # .lock is core's

def test_links_refused(tmp_path):
    new(tmp_path/'a', 3).close(); (tmp_path/'l').symlink_to(tmp_path/'a')
    with pytest.raises((OSError, StateError)): reopen(tmp_path/'l', mode='r')
    (tmp_path/'a'/'00000000.seg').rename(tmp_path/'elsewhere'); (tmp_path/'a'/'00000000.seg').symlink_to(tmp_path/'elsewhere')
    with pytest.raises((OSError, StateError)): reopen(tmp_path/'a', mode='r')

def test_wipe_leaves_nothing(tmp_path):
    log = new(tmp_path/'a', 100); die(log)
    with open(tmp_path/'a'/'00000002.seg', 'r+b') as f: f.seek(4096+60*W); f.write(b'torn')
    log = reopen(tmp_path/'a'); view = log[0:4].key
    gone = log.wipe()
    assert gone.records == 100 and gone.files == 4 and gone.bytes > 100*W and gone.live_views == 1 and gone.left == []
    assert not os.listdir(tmp_path) and torch.equal(view, rows(0, 4)['key'])
    log = new(tmp_path/'a', 3); (tmp_path/'a'/'mine.txt').write_text('x')
    assert log.wipe().left == ['mine.txt'] and sorted(os.listdir(tmp_path/'a')) == ['.lock', 'mine.txt']
    assert opened(tmp_path/'a') is None

def test_wipe_of_what_cannot_be_opened(tmp_path):
    new(tmp_path/'a', 3).close(); (tmp_path/'a'/'00000000.seg').write_bytes(b'rubbish'); (tmp_path/'a'/'00000001.seg.gone').write_bytes(b'old')
    assert opened(tmp_path/'a') is None and wipe_log(tmp_path/'a').files == 2 and not os.listdir(tmp_path)
    log = new(tmp_path/'a', 3)
    with pytest.raises(StateError): wipe_log(tmp_path/'a')          # in use

def test_no_pickle():
    src = ''.join(open(m.__file__).read() for m in (L, segments))
    assert 'pickle' not in src and 'torch.load' not in src and 'time.time' not in src

# ---- against a plain list

def test_random_use_agrees_with_a_list(tmp_path):
    rng, log, n = random.Random(3), new(tmp_path/'a', capacity=5), 0
    for step in range(120):
        k = rng.choice([0, 1, 2, 7, 33]); put(log, k); n += k
        if rng.random() < .2: (die if rng.random() < .5 else TraceLog.close)(log); log = reopen(tmp_path/'a')
        assert len(log) == n
        if not n: continue
        i, j = sorted((rng.randrange(n), rng.randrange(n))); idx = torch.randint(n, (3, 4))
        assert torch.equal(log[i:j].value, rows(0, n)['value'][i:j]) and torch.equal(log.read(idx).key, rows(0, n)['key'][idx])
        assert log.find(i*.5) == i and log.find(i*.5+.1) == i+1 and log.pointer(i).segment == log._seg(i).number
    assert [s.end-s.first for s in log.segs][:4] == [5, 10, 20, 40] and not wrong(log)

def test_fields_keep_their_order(tmp_path):
    fields, n = dict(z=(3, 'float32'), a=(2, 'float64'), m=(1, 'int32')), torch.arange(4.)
    given = dict(z=n[:, None]+torch.arange(3.), a=n[:, None].double()*torch.tensor([1., -1.]), m=n[:, None].int())
    with TraceLog.create(tmp_path/'a', fields, **WHO) as log: log.append(n, **given)
    with reopen(tmp_path/'a') as log: assert all(torch.equal(log[:][k], v) for k, v in given.items())
