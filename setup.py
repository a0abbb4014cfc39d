"Package metadata: everything is read from settings.ini"
import shlex
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

root = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
lib, readme, suffix = cfg['lib_path'], root/'README.md', '_requirements'

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(),
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else cfg['description'],
    long_description_content_type='text/markdown',
    python_requires='>=' + cfg['min_python'],
    packages=find_packages(include=[lib, lib + '.*']), package_data={lib: ['assets/**']}, include_package_data=False,
    install_requires=shlex.split(cfg['requirements']),
    extras_require={k[:-len(suffix)]: shlex.split(v) for k, v in cfg.items() if k.endswith(suffix)},
    entry_points={'nbdev': [f'{lib} = {lib}._modidx:d'], 'console_scripts': [f'{lib} = {lib}.app.command:main']},
    zip_safe=False)
