"The verbs about texts: files read into a memory, lists, one thing forgotten; stopped, killed, fed odd files"
import json, os, signal, sys
from collections import Counter
from pathlib import Path
import numpy as np, pytest
from chronomem.app import cli, command, files, verbs
from test_cli import Terminal, ends, reads, start, until

MAIN = 'from chronomem.app.command import main; main()'

@pytest.fixture(scope='session')
def model():
    from chronomem.live.repair import ChronoModel
    from chronomem.live import memories
    return ChronoModel.default()

@pytest.fixture(autouse=True)
def quick(monkeypatch, model):
    "In this process the default model is loaded once"
    monkeypatch.setattr(cli, '_load', lambda name, encoder=None: model)

@pytest.fixture
def home(tmp_path): return tmp_path/'home'

@pytest.fixture
def notes(tmp_path):
    "A folder as people have them"
    d = tmp_path/'notes'
    for name, text in {'tea.md': '# Tea\n\nI like green tea.\n\nMy cat is called Zorro.\n', 'deep/oslo.txt': 'I live in Oslo.', '.hidden.md': 'x', '.git/x.md': 'x', 'empty.md': ' \n', 'odd.xyz': 'x'}.items():
        (d/name).parent.mkdir(parents=True, exist_ok=True)
        (d/name).write_text(text)
    say = lambda role, text: dict(role=role, content=text)
    (d/'chat.jsonl').write_text('\n'.join(map(json.dumps, [say('user', 'My dog is Rex.'), dict(messages=[say('user', 'I work as a baker.'), say('assistant', 'Noted.'), say('tool', '3')])])) + '\n{broken\n')
    (d/'binary.txt').write_bytes(b'a\0b')
    (d/'latin.txt').write_bytes(b'caf\xe9')
    (d/'link.md').symlink_to(d/'tea.md')
    os.mkfifo(d/'pipe.txt')
    return d

def run(capsys, *argv):
    "Exit code, stdout and stderr of a command in this process"
    capsys.readouterr()
    try: command.main([*map(str, argv)])
    except SystemExit as e: code = e.code
    else: code = 0
    return (code, *capsys.readouterr())

def mistake(capsys, *argv):
    code, out, err = run(capsys, *argv)
    assert code == 2 and len(err.splitlines()) == 1 and err.startswith(f'chronomem {argv[0]}: '), (code, out, err)
    return err

def ingest(capsys, what, home, *more):
    code, out, err = run(capsys, 'ingest', what, '--home', home, '--json', *more)
    assert code == 0, err
    return json.loads(out)

def listed(capsys, home, *more):
    code, out, err = run(capsys, 'memories', '--home', home, '--json', *more)
    assert code == 0, err
    return json.loads(out)

def told(model, home, user='me'):
    "Every text that is kept, and the age of the memory"
    with model.session(user, home) as s: return [(r.source, r.position, model.spoken(r.ids)) for r in s._texts.rows()], s.t

@pytest.fixture
def says(monkeypatch): return lambda text: monkeypatch.setattr(sys, 'stdin', Terminal(text))

# ingest

def test_a_folder(capsys, notes, home, model):
    got = ingest(capsys, notes, home)
    assert (got['files'], got['texts'], got['before'], got['unchanged']) == (3, 6, 0, 0)
    why = {(s['source'], s.get('line')): s['why'] for s in got['skipped']}
    assert why == {('.hidden.md', None): 'hidden', ('.git', None): 'hidden', ('empty.md', None): 'empty', ('odd.xyz', None): 'unknown type', ('link.md', None): 'a link', ('pipe.txt', None): 'not a plain file',
                   ('binary.txt', None): 'binary', ('latin.txt', None): 'not UTF-8 (byte 3)', ('chat.jsonl', 2): 'role tool, expected user, assistant, system', ('chat.jsonl', 3): 'not JSON'}
    kept = {(m['source'], m['position'], m['role']) for m in listed(capsys, home)}
    assert kept == {('tea.md', 1, 'user'), ('tea.md', 5, 'user'), ('deep/oslo.txt', 1, 'user'), ('chat.jsonl', 1, 'user'), ('chat.jsonl', 2, 'user'), ('chat.jsonl', 2, 'assistant')}
    assert told(model, home)[1] == got['inferences']

def test_what_was_skipped_is_said_once_and_counted_last(capsys, notes, home):
    code, out, err = run(capsys, 'ingest', notes, '--home', home)
    assert code == 0 and out == 'ingested: 6 texts of 3 files, 6 inferences; 10 skipped\n'
    assert len(err.splitlines()) == 10 and 'chronomem ingest: chat.jsonl:3: skipped, not JSON\n' in err and 'latin.txt: skipped, not UTF-8' in err

def test_again_does_nothing_and_opens_nothing(capsys, notes, home, model, monkeypatch):
    ingest(capsys, notes, home)
    before = told(model, home)
    real = verbs.read
    monkeypatch.setattr(verbs, 'read', lambda path: pytest.fail('opened') if path.name in ('tea.md', 'oslo.txt', 'chat.jsonl') else real(path))
    got = ingest(capsys, notes, home)
    assert (got['texts'], got['unchanged'], got['inferences']) == (0, 3, 0) and told(model, home) == before

def test_a_changed_file_gives_what_is_new(capsys, notes, home, model):
    ingest(capsys, notes, home)
    f = notes/'tea.md'
    f.write_text('New above.\n\n' + f.read_text() + '\nMy cat is called Zorro.\n')
    got = ingest(capsys, notes, home)
    assert (got['files'], got['texts'], got['before'], got['unchanged']) == (1, 2, 2, 2)
    assert Counter(t for *_, t in told(model, home)[0])['My cat is called Zorro.'] == 2     # said twice now

def test_a_touched_file_is_looked_into(capsys, notes, home):
    ingest(capsys, notes, home)
    os.utime(notes/'tea.md', (1, 1))
    got = ingest(capsys, notes, home)
    assert (got['files'], got['texts'], got['before']) == (1, 0, 2)

def test_without_the_small_file_the_texts_tell(capsys, notes, home, model):
    ingest(capsys, notes, home)
    progress, = home.rglob(verbs.PROGRESS)
    for damaged in ('{', '[]', '{"files": {"a": 3}}'):
        progress.write_text(damaged)
        assert ingest(capsys, notes, home)['texts'] == 0

def test_latents_only(capsys, notes, home, model):
    got = ingest(capsys, notes, home, '--keep', 'latents')
    assert got['texts'] == 6 and ingest(capsys, notes, home, '--keep', 'latents')['unchanged'] == 3
    progress, = home.rglob(verbs.PROGRESS)
    known = json.loads(progress.read_text())
    for k, e in known['files'].items():
        if e['size'] == (notes/'tea.md').stat().st_size: known['files'][k] = e | dict(whole=False, done=1, t=4)   # killed before the second text: it is the last of six
    for t, more in ((5, 0), (6, 1)):                           # the second text was lived if the memory has aged since
        for e in known['files'].values():
            if e['t'] is not None: e['t'] = t
        progress.write_text(json.dumps(known))
        assert ingest(capsys, notes, home, '--keep', 'latents')['texts'] == more
    files = [p.read_bytes() for p in home.rglob('*') if p.is_file()]
    assert not any(w in b for b in files for w in (b'Zorro', b'oslo', b'tea.md')) and not any(home.rglob('texts*/*.seg'))

def test_progress_is_private_and_wiped(capsys, notes, home):
    ingest(capsys, notes, home)
    p, = home.rglob(verbs.PROGRESS)
    assert p.stat().st_mode & 0o777 == 0o600 and not any(w in p.read_text() for w in ('tea', 'Zorro', 'oslo', str(notes)))
    assert run(capsys, 'wipe', 'me', '--home', home, '--yes')[0] == 0 and not p.exists()
    assert ingest(capsys, notes, home)['texts'] == 6

def test_one_file_and_stdin(capsys, notes, home, model, monkeypatch):
    assert ingest(capsys, notes/'odd.xyz', home)['texts'] == 1
    pipe = lambda b: monkeypatch.setattr(sys, 'stdin', type('In', (), dict(buffer=__import__('io').BytesIO(b))))
    pipe(b'I like tea.\n\nI live in Oslo.')
    assert ingest(capsys, '-', home, '--role', 'system')['texts'] == 2
    pipe((notes/'chat.jsonl').read_bytes())
    assert ingest(capsys, '-', home)['texts'] == 3
    assert [s for s, *_ in told(model, home)[0]] == ['odd.xyz'] + ['stdin']*5

@pytest.mark.parametrize('name,why', [('none.md', 'there is no'), ('binary.txt', 'binary'), ('latin.txt', 'not UTF-8'), ('empty.md', 'empty'), ('pipe.txt', 'not a plain file')])
def test_a_file_that_is_no_text(name, why, capsys, notes, home): assert why in mistake(capsys, 'ingest', notes/name, '--home', home)

def test_too_big(capsys, notes, home, monkeypatch):
    monkeypatch.setattr(files, 'LARGEST', 40)
    got = ingest(capsys, notes, home)
    assert {s['source']: s['why'] for s in got['skipped'] if 'big' in s['why']} == {'tea.md': 'too big: more than 0 MiB', 'chat.jsonl': 'too big: more than 0 MiB'} and got['files'] == 1

def test_names_and_texts_that_no_encoding_holds(capsys, notes, home, model):
    (notes/os.fsdecode(b'caf\xe9.md')).write_text('I like coffee.')
    (notes/'bad.jsonl').write_text('{"role": "user", "content": "\\ud800"}\n{"role": "user", "content": "I like cake."}')
    got = ingest(capsys, notes, home)
    assert got['texts'] == 8 and any(s['source'] == 'bad.jsonl' and s['line'] == 1 for s in got['skipped'])
    assert ('caf\ufffd.md', 1, 'I like coffee.') in told(model, home)[0]

def test_a_name_longer_than_a_source(capsys, notes, home):
    d = notes/('deep'*20)/('deeper'*10)
    d.mkdir(parents=True)
    (d/'x.md').write_text('I like tea.')
    assert ingest(capsys, notes, home)['texts'] == 7
    os.utime(d/'x.md', (1, 1))
    assert ingest(capsys, notes, home)['before'] == 1

LINES = [f'Person {i} lives in house {i}.' for i in range(400)]

@pytest.fixture
def long(tmp_path):
    (tmp_path/'long.md').write_text('\n\n'.join(LINES) + '\n')
    return tmp_path/'long.md'

SLOW = '''
import time
from chronomem import Session
real = Session.ingest
def ingest(self, *a, **kw):
    out = real(self, *a, **kw)
    print('lived', flush=True)
    return out
Session.ingest = ingest
'''

@pytest.mark.parametrize('keep', ['texts', pytest.param('latents', marks=pytest.mark.slow)])
def test_killed_in_the_middle(keep, capsys, long, home, model):
    "Killed at any moment: no text twice, none missing"
    long.write_text('\n\n'.join(LINES[:60]))
    p = start('ingest', long, '--home', home, '--keep', keep, code=SLOW+MAIN)
    for _ in range(12): reads(p, 'lived')
    os.killpg(p.pid, signal.SIGKILL)
    p.communicate()
    with model.session('me', home, keep=keep) as s: had = s.t
    assert 12 <= had < 60
    got = ingest(capsys, long, home, '--keep', keep)
    assert got['before'] == had and got['texts'] == 60-had
    with model.session('me', home, keep=keep) as s: assert s.t == 60
    if keep == 'texts': assert [t for *_, t in told(model, home)[0]] == LINES[:60]

def test_ctrl_c_keeps_what_was_told(capsys, long, home, model):
    p = start('ingest', long, '--home', home, code=SLOW+MAIN)
    for _ in range(5): reads(p, 'lived')
    p.send_signal(signal.SIGINT)
    ends(p, 130, 'chronomem ingest: interrupted; what was ingested is kept; the same command goes on from there', 2)
    kept, t = told(model, home)
    assert 5 <= len(kept) == t < 400 and [x for *_, x in kept] == LINES[:t]
    long.write_text('\n\n'.join(LINES[:t+2]))
    got = ingest(capsys, long, home)
    assert (got['before'], got['texts']) == (t, 2)

def test_verbs_in_a_process(capsys, notes, home):
    "`ingest` has had its own"
    ingest(capsys, notes/'tea.md', home)
    p = start('memories', 'cat', '--home', home, '--json', code=MAIN)
    out, err = p.communicate(timeout=60)
    cat = json.loads(out)[0]
    assert p.returncode == 0 and not err and 'Zorro' in cat['text']
    p = start('forget', '--id', cat['id'], '--yes', '--home', home, code=MAIN)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 0 and 'forgotten exactly: ' in out and not err

# memories

def test_memories(capsys, notes, home, model):
    ingest(capsys, notes, home)
    code, out, err = run(capsys, 'memories', '--home', home, '-n', '3')
    assert code == 0 and not err and len(out.splitlines()) == 3 and 'I live in Oslo.' in out.splitlines()[0] and 'deep/oslo.txt:1' in out.splitlines()[0]
    best = listed(capsys, home, 'Where do I live? Oslo')[0]
    assert 'Oslo' in best['text'] and best['score'] > 0 and set(best) == {'id', 't', 'at', 'role', 'source', 'position', 'text', 'score'}
    assert listed(capsys, home, 'My cat is called Zorro.')[0]['text'] == 'My cat is called Zorro.'   # the very words find it
    with model.session('you', home): pass
    code, out, err = run(capsys, 'memories', 'tea', '--home', home, '--user', 'you', '--json')
    assert code == 0 and json.loads(out) == [] and 'no text of you is kept' in err

def test_lines_are_cut_for_people_only(capsys, home, monkeypatch, model):
    with model.session('me', home) as s: s.ingest('tea \x1b[31m ' + 'word '*15, role='user')
    monkeypatch.setattr(verbs, 'terminal', lambda out: 50)
    line, = run(capsys, 'memories', '--home', home)[1].splitlines()
    assert len(line) == 50 and line.endswith('…') and '\x1b' not in line
    monkeypatch.undo()

def test_looking_makes_no_memory(capsys, home, model, notes):
    ingest(capsys, notes/'tea.md', home, '--user', 'ada')
    files = {*home.rglob('*')}
    assert "did you mean 'ada'?" in mistake(capsys, 'memories', '--user', 'adda', '--home', home) and "nobody called 'bob'" in mistake(capsys, 'forget', '--id', 'x', '--yes', '--user', 'bob', '--home', home)
    assert {p for p in home.rglob('*')} == files

# forget

def grep(home, model, word):
    "Files in which a word stands, as text or as token ids of any width"
    ids = model.encode(' ' + word)
    assert len(ids) > 1
    forms = [word.encode()] + [np.array(ids, d).tobytes() for d in ('int16', 'int32', 'int64')]
    return [p for p in home.rglob('*') if p.is_file() and any(f in p.read_bytes() for f in forms)]

def test_forgotten_to_the_last_byte(capsys, notes, home, model):
    ingest(capsys, notes, home)
    assert grep(home, model, 'Zorro')
    cat = next(m for m in listed(capsys, home) if 'Zorro' in m['text'])
    code, out, err = run(capsys, 'forget', '--id', cat['id'], '--yes', '--home', home)
    assert code == 0 and not err and 'My cat is called Zorro.' in out and 'forgotten exactly: 1 inference lived again' in out and '6 inferences before, 5 now' in out
    assert not grep(home, model, 'Zorro') and not any('Zorro' in m['text'] for m in listed(capsys, home))
    assert ingest(capsys, notes, home)['texts'] == 0 and not grep(home, model, 'Zorro')       # it stays forgotten
    with model.session('me', home) as s, model.session('never', home) as other:
        for r in s._texts.rows(): other.ingest(model.spoken(r.ids), model_role(r), r.source, r.position)
        for k in s.state.rungs.keys(True, True): assert s.state.rungs[k].equal(other.state.rungs[k]), k

def model_role(r): return r.said[0][2]

def test_a_query_shows_the_best_and_asks_which(capsys, notes, home, says):
    ingest(capsys, notes, home)
    for query, text, n in (('tea', '\n', 6), ('tea', '1\nn\n', 6), ('tea', '', 6), ('my', '1\ny\n', 5), ('i', 'a\ny\n', 2), ('Zorro', '1, 1\ny\n', 1)):
        says(text)
        code, out, _ = run(capsys, 'forget', query, '--home', home)
        assert code == (0 if n < 6 else 1) and ('forgotten exactly' if n < 6 else 'nothing was changed') in out and 'which? a number from 1' in out, out
        assert len(listed(capsys, home)) == n, query
    says('9\n')
    code, out, err = run(capsys, 'forget', 'xylophone', '--home', home)
    assert code == 2 and 'expected numbers from 1 to 1' in err and 'no text has all these words; the nearest are\n 1  ' in out
    says('a\ny\n')
    assert run(capsys, 'forget', 'xylophone', '--home', home)[0] == 0 and 'no text of me is kept' in mistake(capsys, 'forget', 'xylophone', '--home', home)

def test_forgetting_finds_questions_and_answers_too(capsys, home, model, says):
    with model.session('me', home) as s:
        s.ingest('My cat is Zorro.', role='user')
        s.ask('Is Zorro a cat?')
    says('a\ny\n')
    out = run(capsys, 'forget', 'my cat Zorro', '--home', home)[1]
    assert len(listed(capsys, home)) == 2 and 'My cat is Zorro.' in out
    says('a\ny\n')
    assert run(capsys, 'forget', 'ZORRO', '--home', home)[0] == 0 and not listed(capsys, home) and not grep(home, model, 'Zorro')

def test_without_a_terminal_it_must_be_named(capsys, notes, home, monkeypatch):
    ingest(capsys, notes, home)
    id = listed(capsys, home)[0]['id']
    for argv in (['tea'], ['tea', '--yes'], ['--id', id]):
        monkeypatch.setattr(sys, 'stdin', None)
        assert '--id' in mistake(capsys, 'forget', *argv, '--home', home)
    assert 'expected one of them' in mistake(capsys, 'forget', '--home', home) and 'nothing is kept under 00' in mistake(capsys, 'forget', '--id', '00', '--yes', '--home', home)
    assert len(listed(capsys, home)) == 6

def test_the_same_words_elsewhere_are_named(capsys, home, model):
    with model.session('me', home) as s:
        for _ in range(2): s.ingest('I like tea.', role='user')
    one, two = listed(capsys, home)
    out = run(capsys, 'forget', '--id', two['id'], '--yes', '--home', home)[1]
    assert f"the very same is also kept as {one['id']}" in out and [m['id'] for m in listed(capsys, home)] != []

def test_where_texts_do_not_reach_back(capsys, home, model, says, monkeypatch):
    def begin(user):
        with model.session(user, home, keep='latents') as s: s.ingest('My name is Alice.', role='user')
        with model.session(user, home) as s:
            for x in ('My cat is Zorro.', 'I like tea.'): s.ingest(x, role='user')
        return 'forget', '--id', listed(capsys, home, '--user', user)[1]['id'], '--yes', '--home', home, '--user', user
    argv = begin('ada')
    monkeypatch.setattr(sys, 'stdin', None)
    assert '--partial rest' in mistake(capsys, *argv) and grep(home, model, 'Zorro')
    says('\n')
    assert run(capsys, *argv)[0] == 1 and grep(home, model, 'Zorro')
    says('rest\n')
    code, out, _ = run(capsys, *argv)
    assert code == 0 and 'not exactly: the latents were made anew' in out and '3 inferences before, 1 now' in out and not grep(home, model, 'Zorro')
    code, out, _ = run(capsys, *begin('bob'), '--partial', 'empty')
    assert code == 0 and 'the ladder was emptied' in out and '3 now' in out and not grep(home, model, 'Zorro')
    with model.session('bob', home) as s: assert all(int((r['born'] >= 0).sum()) == 0 for r in s.state.rungs.values())

# ask, chat, stats

def test_ask_with_sources(capsys, home, model):
    with model.session('me', home) as s: s.ingest('My name is Alice.', role='user', source='a.md', position=3)
    code, out, err = run(capsys, 'ask', 'What is my name?', '--sources', '--recall', 'both', '--home', home)
    assert code == 0 and len(out.splitlines()) == 1 and err.startswith('from:\n') and 'a.md:3' in err and 'My name is Alice.' in err
    code, out, err = run(capsys, 'ask', 'What is my name?', '--sources', '--recall', 'traces', '--json', '--home', home)
    got = json.loads(out)
    assert not err and got['question'] == 'What is my name?' and got['answer'] and [t['source'] for t in got['sources']] == ['a.md']
    code, out, err = run(capsys, 'ask', 'What is my name?', '--sources', '--recall', 'ladder', '--home', home)
    assert err == 'from: no text\n' and 'sources' not in json.loads(run(capsys, 'ask', 'What?', '--json', '--home', home)[1])
    got = run(capsys, 'ask', 'What is my name?', '--sources', '--recall', 'both', '--budget', '1', '--home', home)
    assert got[2] == 'from: no text\n'
    assert 'recall' in mistake(capsys, 'ask', 'x', '--keep', 'latents', '--recall', 'both', '--home', home)

def test_answers_are_not_found_as_if_people_had_said_them(capsys, home, model):
    for verb in (['ask', 'What is my name?', '--home', home],): run(capsys, *verb)
    with model.session('me', home) as s: assert s.t == 1 and s.memories('name', every=False) == [] and len(s.memories()) == 2

def test_chat_shows_lists_and_forgets(capsys, home, model, says):
    with model.session('me', home) as s:
        for x in ('My name is Alice.', 'My cat is Zorro.', 'I like tea.'): s.ingest(x, role='user')
        id = s.memories()[1].id
    says(f'/sources\nWhat is my name?\n/sources\n/memories cat\n/forget {id}\nn\n/forget {id}\ny\n/memories cat\n/forget 00\n/forget\n\n')
    code, out, err = run(capsys, 'chat', '--home', home, '--recall', 'both')
    assert code == 0 and 'sources are shown' in out and '\nfrom:\n' in out and 'sources are not shown' in out
    assert 'not forgotten' in out and 'forgotten exactly: 2 inferences lived again' in out and '/memories WHAT' in out
    assert len(err.splitlines()) == 1 and 'nothing is kept under 00' in err and not grep(home, model, 'Zorro')

def test_chat_asks_what_to_do_where_texts_do_not_reach_back(capsys, home, model, says):
    with model.session('me', home, keep='latents') as s: s.ingest('My name is Alice.', role='user')
    with model.session('me', home) as s:
        s.ingest('My cat is Zorro.', role='user')
        id = s.memories()[0].id
    says(f'/forget {id}\n\n/forget {id}\nempty\n/memories\n\n')
    code, out, _ = run(capsys, 'chat', '--home', home)
    assert code == 0 and 'not forgotten' in out and 'the ladder was emptied' in out and 'nothing is kept' in out

def test_keep_latents_keeps_no_word(capsys, home, model):
    for argv in (['tell', 'My cat is Zorro.'], ['ask', 'Who is Zorro?']): assert run(capsys, *argv, '--keep', 'latents', '--home', home)[0] == 0
    assert not grep(home, model, 'Zorro')
    out = run(capsys, 'stats', 'me', '--home', home)[1]
    assert 'by default: no texts are kept, only hidden states' in out and json.loads(run(capsys, 'stats', '--home', home, '--json')[1])[0]['texts'] == 0

def test_stats_say_that_texts_are_readable(capsys, home, model):
    run(capsys, 'tell', 'My cat is Zorro.', '--home', home)
    out = run(capsys, 'stats', 'me', '--home', home)[1]
    assert 'texts are kept, 1 passages, readable' in out and '`chronomem memories --user me`' in out
    assert json.loads(run(capsys, 'stats', '--home', home, '--json')[1])[0]['texts'] == 1

# The table

def test_every_verb_has_help(capsys):
    for name, v in command.VERBS.items():
        code, out, _ = run(capsys, name, '--help')
        assert code == 0 and v.help[1:] in ' '.join(out.split()), name

def test_a_verb_is_three_lines(capsys):
    def arguments(v): v.add_argument('x')
    def hum(a): print(a.x); return 3
    table = {**command.VERBS, 'hum': cli.Verb('hum a tune', arguments, hum, model=False)}
    with pytest.raises(SystemExit) as e: cli.main(['hum', 'la'], table)
    assert e.value.code == 3 and capsys.readouterr().out == 'la\n'
