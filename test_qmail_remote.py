#!/usr/bin/env python3
"""The tests of qmail_remote.py, to be read as its specification.

Rooms, in order: common ground; fakes (a scripted SMTP server, a scripted
name server); pure tables; dialogues; the process from outside; real peers
(skipped where they are not installed, required where REAL_PEERS=required);
and the commands `demo`, `bench`, `fuzz` and `check`, which runs all tests.
python3 test_qmail_remote.py Class.test runs one.
"""
import ast
import atexit
import binascii
import collections
import concurrent.futures
import contextlib
import dis
import errno
import fcntl
import functools
import glob
import hashlib
import hmac
import importlib.util
import io
import itertools
import json
import os
import platform
import pty
import pwd
import py_compile
import random
import re
import resource
import select
import shutil
import signal
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
import tracemalloc
import unittest
import warnings

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, 'qmail_remote.py')
sys.path.insert(0, HERE)
import qmail_remote as qr                                       # noqa: E402

with open(PROGRAM, encoding='utf-8') as source:
    MANUAL = re.search(r'(?ms)^r"""\n(.*?)^"""$', source.read()).group(1)

# ------------------------------------------------------------ Common ground

MESSAGE = b'Subject: hello\n\nHello, world.\n'
ME = b'me.example'


class Home:
    """A qmail home in a temporary directory: control files from keywords
    (bytes; None leaves a file out) and a queue/lock/tcpto of 1024 zeros."""

    def __init__(self, **control):
        self.path = os.path.realpath(tempfile.mkdtemp(prefix='qmail-'))
        os.makedirs(os.path.join(self.path, 'control'))
        os.makedirs(os.path.join(self.path, 'queue', 'lock'))
        self.tcpto = os.path.join(self.path, 'queue', 'lock', 'tcpto')
        with open(self.tcpto, 'wb') as f:
            f.write(bytes(1024))
        control.setdefault('me', ME)
        control.setdefault('timeoutconnect', b'5')
        control.setdefault('timeoutremote', b'5')
        for name, data in control.items():
            self.write(name, data)

    def write(self, name, data):
        """Writes control/name (bytes), or removes it (None)."""
        path = os.path.join(self.path, 'control', name)
        if data is None:
            if os.path.exists(path):
                os.unlink(path)
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb') as f:
            f.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        shutil.rmtree(self.path, ignore_errors=True)


@contextlib.contextmanager
def inside(home):
    """Meanwhile the working directory is home's."""
    before = os.getcwd()
    os.chdir(home.path)
    try:
        yield
    finally:
        os.chdir(before)


def rspawn_verdict(status, output):
    """What qmail-rspawn makes of a run (qmail-rspawn.c, report()): the
    letter K, Z or D.  status as subprocess gives it, negative for a signal.
    """
    if status < 0 or status == 111:
        return 'Z'
    if status:
        return 'D'
    if not output:
        return 'Z'
    verdict = 'D'
    for record in output.split(b'\0')[:-1]:
        if record[:1] in (b'K', b'Z', b'D'):
            verdict = record[:1].decode()
            break
    return {b's': 'Z', b'h': 'D'}.get(output[:1], verdict)


class Outcome:
    """One run of the program: status, output (raw), reports (a list, the
    NULs taken off), stderr, seconds, verdict (as qmail-rspawn reads it),
    trace (lines; of a run in this process)."""
    trace = ()

    def __init__(self, status, output, stderr, seconds):
        self.status, self.output = status, output
        self.stderr, self.seconds = stderr, seconds
        self.reports = output.split(b'\0')[:-1]
        self.verdict = rspawn_verdict(status, output)


@functools.lru_cache()
def compiled():
    """The program as bytecode, in a temporary directory: a process that
    has to compile it takes five times as long to start."""
    folder = tempfile.mkdtemp(prefix='qmail-')
    atexit.register(shutil.rmtree, folder, True)
    return py_compile.compile(PROGRAM, os.path.join(
        folder, 'qmail_remote.pyc'))


def run_program(home, *args, message=MESSAGE, stdin=None, env=None,
                timeout=30, command=None, dns=None, **popen):
    """Runs the real program as a process: run_program(home, host, sender,
    recipient, ...).  args are bytes or str; message goes to fd 0 as a file
    unless stdin (a file or descriptor) is given; dns is a value for
    $DNSCACHEIP.  Raises subprocess.TimeoutExpired after timeout seconds."""
    environment = {'PATH': os.environ.get('PATH', '/usr/bin:/bin'),
                   'QMAILHOME': home.path if home else '/nonexistent',
                   'DNSCACHEIP': dns or '127.0.0.1:1'}
    environment.update(env or {})
    command = command or [sys.executable, '-IS', compiled()]
    with tempfile.TemporaryFile() as body:
        body.write(message)
        body.seek(0)
        start = time.monotonic()
        child = subprocess.Popen(
            list(command) + list(args), env=environment,
            stdin=body if stdin is None else stdin,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **popen)
        try:
            output, stderr = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            raise
        return Outcome(child.returncode, output, stderr,
                       time.monotonic() - start)


# ------------------------------------------------------------ Fakes: DNS

class Mismatch(Exception):
    """The client did not do what the script expects."""


class Gone(Exception):
    """The connection is over: closed, reset, or the test stops it."""


# DNS on the wire, the little that a fake needs, apart from the program's.

DNS_TYPES = {'A': 1, 'NS': 2, 'CNAME': 5, 'SOA': 6, 'PTR': 12, 'MX': 15,
             'TXT': 16, 'AAAA': 28, 'DNAME': 39, 'OPT': 41, 'RRSIG': 46,
             'TLSA': 52}
DNS_TYPE_NAMES = {number: name for name, number in DNS_TYPES.items()}

DnsQuestion = collections.namedtuple('DnsQuestion', 'name type id edns')


class Unframed(bytes):
    """Bytes that a FakeDNS sends over TCP without a length before them."""


def dns_name(name):
    """The wire form of a name, uncompressed; '' and '.' are the root."""
    labels = [x for x in name.rstrip('.').encode('latin-1').split(b'.') if x]
    return b''.join(bytes([len(x)]) + x for x in labels) + b'\0'


def dns_rdata(kind, value):
    """The wire form of a value: an address for A and AAAA, a name for
    CNAME, (preference, name) for MX, (usage, selector, matching, bytes) for
    TLSA; bytes are taken as they are, whatever the type."""
    if isinstance(value, bytes):
        return value
    if kind == 'MX':
        return struct.pack('!H', value[0]) + dns_name(value[1])
    if kind == 'TLSA':
        return bytes(value[:3]) + value[3]
    if kind in ('A', 'AAAA'):
        family = socket.AF_INET if kind == 'A' else socket.AF_INET6
        return socket.inet_pton(family, value)
    return dns_name(value)


def dns_record(name, kind, value, ttl=300, class_=1):
    """One resource record on the wire.  kind may be a number."""
    rdata = dns_rdata(kind, value)
    return dns_name(name) + struct.pack(
        '!HHIH', DNS_TYPES.get(kind, kind), class_, ttl, len(rdata)) + rdata


def dns_message(question, answers=(), flags=0x8180, authority=(),
                additional=(), id_=None):
    """A reply on the wire to a DnsQuestion; the records are wire bytes."""
    extra = list(additional)
    if question.edns:
        extra.append(b'\0' + struct.pack('!HHIH', 41, 1232, 0, 0))
    return b''.join(
        [struct.pack('!6H', question.id if id_ is None else id_, flags, 1,
                     len(answers), len(authority), len(extra)),
         dns_name(question.name),
         struct.pack('!HH', DNS_TYPES.get(question.type, question.type), 1)]
        + list(answers) + list(authority) + extra)


def dns_parse(query):
    """The DnsQuestion in a query.  The name keeps its case."""
    id_, _, questions, _, _, extra = struct.unpack('!6H', query[:12])
    labels, at = [], 12
    while query[at]:
        labels.append(query[at + 1:at + 1 + query[at]])
        at += 1 + query[at]
    number = struct.unpack('!H', query[at + 1:at + 3])[0]
    return DnsQuestion(b'.'.join(labels).decode('latin-1'),
                       DNS_TYPE_NAMES.get(number, number), id_, extra > 0)


class FakeDNS:
    """A scripted recursive name server, UDP and TCP on one loopback port.

    records: {(name, type): [values as for dns_rdata]}.  Names without any
    record get NXDOMAIN, names with others an empty answer; CNAME chains are
    followed and given whole.

    overrides: {(name, type): what}, where type, or both, may be '*' and what
    is a dict with any of
      delay     seconds to wait before the answer
      rcode     answer with this code and no records
      truncate  over UDP set TC and leave the records out
      silent    no answer
      ad        the AD bit for this answer
    or a callable(query, question, via) with via 'udp' or 'tcp'; it returns
    a list of replies, or None for silence.  Over TCP each reply gets its
    length put before it, except Unframed ones, and a None in the list
    closes the connection.

    ad sets the AD bit in every answer.  tcp=False refuses TCP.  queries
    lists (name in lower case, type, via); dns is the value for $DNSCACHEIP.
    """

    def __init__(self, records=None, overrides=None, host='127.0.0.1',
                 ad=False, tcp=True, port=0):
        self.records, self.overrides = {}, {}
        for (name, kind), values in (records or {}).items():
            self.records[name.rstrip('.').lower(), kind] = values
        for (name, kind), what in (overrides or {}).items():
            self.overrides[name.rstrip('.').lower(), kind] = what
        self.queries, self.ad, self.error = [], ad, None
        self._open(host, port, tcp)
        self.dns = '%s:%d' % ('[%s]' % host if ':' in host else host,
                              self.port)
        self._over = False
        for serve in (self._datagrams, self._connections)[:1 + tcp]:
            threading.Thread(target=serve, daemon=True).start()

    def _open(self, host, port, tcp):
        """A UDP and a TCP socket with the same port."""
        family = socket.AF_INET6 if ':' in host else socket.AF_INET
        for attempt in range(50):
            self._udp = socket.socket(family, socket.SOCK_DGRAM)
            self._tcp = socket.socket(family, socket.SOCK_STREAM)
            try:
                self._udp.bind((host, port))
                self.port = self._udp.getsockname()[1]
                self._udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF,
                                     1 << 20)
                if tcp:
                    self._tcp.setsockopt(socket.SOL_SOCKET,
                                         socket.SO_REUSEADDR, 1)
                    self._tcp.bind((host, self.port))
                    self._tcp.listen(512)
                else:
                    self._tcp.close()
                    self._tcp = None
                return
            except OSError:
                self._udp.close()
                self._tcp.close()
                if port or attempt == 49:
                    raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Stops at once.  Safe to call twice."""
        if not self._over:
            self._over = True
            self._udp.sendto(b'', self._udp.getsockname())
            if self._tcp:
                with contextlib.suppress(OSError):
                    self._tcp.shutdown(socket.SHUT_RDWR)
                self._tcp.close()

    def ordinary(self, question, via='udp', rcode=None, truncate=False,
                 ad=None):
        """The reply as a well-behaved recursor gives it, for callables that
        want to change something in it."""
        name, chain, answers = question.name.rstrip('.').lower(), 0, []
        owner, kind = question.name, question.type
        while chain < 20 and kind != 'CNAME':
            target = self.records.get((name, 'CNAME'))
            if not target:
                break
            answers.append(dns_record(owner, 'CNAME', target[0]))
            owner, name = target[0], target[0].rstrip('.').lower()
            chain += 1
        values = self.records.get((name, kind), ())
        answers += [dns_record(owner, kind, value) for value in values]
        if rcode is not None:
            answers = []
        elif not values and name not in {n for n, _ in self.records}:
            rcode = 3
        flags = 0x8180 | (rcode or 0)
        flags |= 0x20 if (self.ad if ad is None else ad) else 0
        if truncate and via == 'udp':
            flags, answers = flags | 0x200, []
        return dns_message(question, answers, flags)

    def _answer(self, query, via):
        """(delay, replies) to one query."""
        try:
            return self._replies(query, via)
        except Exception as e:
            self.error = self.error or 'fault in the fake: %r' % e
            return 0, []

    def _replies(self, query, via):
        try:
            question = dns_parse(query)
        except (IndexError, struct.error):
            self.error = self.error or 'not a question: %r' % query
            return 0, []
        name = question.name.lower()
        self.queries.append((name, question.type, via))
        what = next((self.overrides[key] for key in (
            (name, question.type), (name, '*'), ('*', '*'))
            if key in self.overrides), {})
        if callable(what):
            return 0, what(query, question, via) or []
        what = dict(what)
        delay = what.pop('delay', 0)
        if what.pop('silent', False):
            return 0, []
        return delay, [self.ordinary(question, via, **what)]

    def _datagrams(self):
        with self._udp:
            while True:
                query, peer = self._udp.recvfrom(65535)
                if self._over:
                    return
                delay, replies = self._answer(query, 'udp')
                if delay:
                    threading.Thread(target=self._send, daemon=True, args=(
                        replies, peer, delay)).start()
                else:
                    self._send(replies, peer)

    def _send(self, replies, peer, delay=0):
        time.sleep(delay)
        with contextlib.suppress(OSError):      # closed, or too long
            for reply in replies:
                self._udp.sendto(reply, peer)

    def _connections(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._connection, daemon=True, args=(
                    self._tcp.accept()[0],)).start()

    def _connection(self, sock):
        with contextlib.suppress(OSError), sock, \
                sock.makefile('rb') as stream:
            while True:
                size = stream.read(2)
                if len(size) < 2:
                    return
                delay, replies = self._answer(
                    stream.read(struct.unpack('!H', size)[0]), 'tcp')
                time.sleep(delay)
                for reply in replies:
                    if reply is None:
                        return
                    if not isinstance(reply, Unframed):
                        reply = struct.pack('!H', len(reply)) + reply
                    sock.sendall(reply)


# ------------------------------------------------------------ Fakes: SMTP, TLS

# Certificates made once, for tests alone, valid from 2020 to 2099.  All that
# the CA has signed are for the key `server`:
#   relay    for relay.example, mx1 and mx2.there.example, mail.dane.example
#            and 127.0.0.1
#   expired  the same, until 2021
#   below    the same, signed by `inter`, an intermediate CA below `ca`
#   other    for other.example
#   client   for nobody, to be shown by a client
# `self` is like relay, but signed with a key of its own.

CERTIFICATES = {        # in base64
    'ca':
    'MIIBVjCB/aADAgECAgEBMAoGCCqGSM49BAMCMBIxEDAOBgNVBAMMB1Rlc3QgQ0EwIBcNMjAw'
    'MTAxMDAwMDAwWhgPMjA5OTEyMzEyMzU5NTlaMBIxEDAOBgNVBAMMB1Rlc3QgQ0EwWTATBgcq'
    'hkjOPQIBBggqhkjOPQMBBwNCAASMuYex28EUWG3b3gEvD8etrjKzh80OKguQeGBUvZt+PDzs'
    'iLkqbM4+SVcQptRt8JSX+5AtyTermVez+8XL0esuo0IwQDAPBgNVHRMBAf8EBTADAQH/MA4G'
    'A1UdDwEB/wQEAwICBDAdBgNVHQ4EFgQUWATuUzyie9JD0GLDfNvmGIW0LiEwCgYIKoZIzj0E'
    'AwIDSAAwRQIgL9RIDxfUDnxMZ/EKWd8KEc39Z5ujkO5IFj3KE+ql8n0CIQCCqVV0zvZ+1Kk4'
    '5gW8quCKAryuFFoXJybVU9VQtpQSrA==',
    'inter':
    'MIIBhjCCASugAwIBAgIBAjAKBggqhkjOPQQDAjASMRAwDgYDVQQDDAdUZXN0IENBMCAXDTIw'
    'MDEwMTAwMDAwMFoYDzIwOTkxMjMxMjM1OTU5WjAfMR0wGwYDVQQDDBRUZXN0IGludGVybWVk'
    'aWF0ZSBDQTBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABNtsFK6g614pDY+M5/bfU0M96UNW'
    'y2rc7rM+VK+WnqKJWEs37TACwsMYcSXk5eMUuSDrRt9w/i5U109dVvNSIgajYzBhMA8GA1Ud'
    'EwEB/wQFMAMBAf8wDgYDVR0PAQH/BAQDAgIEMB0GA1UdDgQWBBSLjCA34DM3NFiWSA0qHmVI'
    'm/tCWDAfBgNVHSMEGDAWgBRYBO5TPKJ70kPQYsN82+YYhbQuITAKBggqhkjOPQQDAgNJADBG'
    'AiEAoZUXKrhDdCr7j0FEbubwTHD0hUgJfEhmu7HEPhrKhHoCIQDT9zW8MAEN/eir0d3xLz5s'
    'V/Ah1WblmkSJE1lIu+ES8Q==',
    'relay':
    'MIIBwzCCAWmgAwIBAgIBAzAKBggqhkjOPQQDAjASMRAwDgYDVQQDDAdUZXN0IENBMCAXDTIw'
    'MDEwMTAwMDAwMFoYDzIwOTkxMjMxMjM1OTU5WjAYMRYwFAYDVQQDDA1yZWxheS5leGFtcGxl'
    'MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEReZ14ybA5sYeW3mEiPmkjk1v+zRJy/xsovoN'
    'syTi/L7OIhylnOSnReWPIF+zOffJFEK/JM5+1FiqBc1CCA3/a6OBpzCBpDAJBgNVHRMEAjAA'
    'MFcGA1UdEQRQME6CDXJlbGF5LmV4YW1wbGWCEW14MS50aGVyZS5leGFtcGxlghFteDIudGhl'
    'cmUuZXhhbXBsZYIRbWFpbC5kYW5lLmV4YW1wbGWHBH8AAAEwHQYDVR0OBBYEFIGWDXVmoQaO'
    'xfe4iJTlEM4dPEBgMB8GA1UdIwQYMBaAFFgE7lM8onvSQ9Biw3zb5hiFtC4hMAoGCCqGSM49'
    'BAMCA0gAMEUCIQDGQahjO+QStjQvVHd4RCzEqd49mTkSLkpdekF6smDm1gIgKgeggJf7MYgi'
    'EIVtLfdoOxRHFgp4eNIu2YHQwIW9RLU=',
    'expired':
    'MIIBwTCCAWegAwIBAgIBBDAKBggqhkjOPQQDAjASMRAwDgYDVQQDDAdUZXN0IENBMB4XDTIw'
    'MDEwMTAwMDAwMFoXDTIxMDEwMTAwMDAwMFowGDEWMBQGA1UEAwwNcmVsYXkuZXhhbXBsZTBZ'
    'MBMGByqGSM49AgEGCCqGSM49AwEHA0IABEXmdeMmwObGHlt5hIj5pI5Nb/s0Scv8bKL6DbMk'
    '4vy+ziIcpZzkp0XljyBfszn3yRRCvyTOftRYqgXNQggN/2ujgacwgaQwCQYDVR0TBAIwADBX'
    'BgNVHREEUDBOgg1yZWxheS5leGFtcGxlghFteDEudGhlcmUuZXhhbXBsZYIRbXgyLnRoZXJl'
    'LmV4YW1wbGWCEW1haWwuZGFuZS5leGFtcGxlhwR/AAABMB0GA1UdDgQWBBSBlg11ZqEGjsX3'
    'uIiU5RDOHTxAYDAfBgNVHSMEGDAWgBRYBO5TPKJ70kPQYsN82+YYhbQuITAKBggqhkjOPQQD'
    'AgNIADBFAiEA4vpejp/vtpFH6rxjuKFyCiSI/cRRmlhnM9T+8d7rsPQCIGTVIaGyOuTatojT'
    'kS6Dl6iXyqHM0wROR7Ok0MIOf3G1',
    'below':
    'MIIB0DCCAXagAwIBAgIBBTAKBggqhkjOPQQDAjAfMR0wGwYDVQQDDBRUZXN0IGludGVybWVk'
    'aWF0ZSBDQTAgFw0yMDAxMDEwMDAwMDBaGA8yMDk5MTIzMTIzNTk1OVowGDEWMBQGA1UEAwwN'
    'cmVsYXkuZXhhbXBsZTBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABEXmdeMmwObGHlt5hIj5'
    'pI5Nb/s0Scv8bKL6DbMk4vy+ziIcpZzkp0XljyBfszn3yRRCvyTOftRYqgXNQggN/2ujgacw'
    'gaQwCQYDVR0TBAIwADBXBgNVHREEUDBOgg1yZWxheS5leGFtcGxlghFteDEudGhlcmUuZXhh'
    'bXBsZYIRbXgyLnRoZXJlLmV4YW1wbGWCEW1haWwuZGFuZS5leGFtcGxlhwR/AAABMB0GA1Ud'
    'DgQWBBSBlg11ZqEGjsX3uIiU5RDOHTxAYDAfBgNVHSMEGDAWgBSLjCA34DM3NFiWSA0qHmVI'
    'm/tCWDAKBggqhkjOPQQDAgNIADBFAiEAleLp2NLTPiXdBADFwHe20f5uPNbMV+w4u5n3lJVx'
    'RPsCIDCYvgAwl3xPAqJKtmsa4h0NmJAeJ+E34+YOtDWPhkdN',
    'other':
    'MIIBgzCCASigAwIBAgIBBjAKBggqhkjOPQQDAjASMRAwDgYDVQQDDAdUZXN0IENBMCAXDTIw'
    'MDEwMTAwMDAwMFoYDzIwOTkxMjMxMjM1OTU5WjAYMRYwFAYDVQQDDA1vdGhlci5leGFtcGxl'
    'MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEReZ14ybA5sYeW3mEiPmkjk1v+zRJy/xsovoN'
    'syTi/L7OIhylnOSnReWPIF+zOffJFEK/JM5+1FiqBc1CCA3/a6NnMGUwCQYDVR0TBAIwADAY'
    'BgNVHREEETAPgg1vdGhlci5leGFtcGxlMB0GA1UdDgQWBBSBlg11ZqEGjsX3uIiU5RDOHTxA'
    'YDAfBgNVHSMEGDAWgBRYBO5TPKJ70kPQYsN82+YYhbQuITAKBggqhkjOPQQDAgNJADBGAiEA'
    '5B8Yu4kP0Ew+13x9L5hDZuiLfdepiZIs+BlfFBDNdQMCIQCWiXeUpyVfzin+sBSN9qk4EYe9'
    'ZEwX48EXIg4R7fW7WQ==',
    'client':
    'MIIBaTCCARCgAwIBAgIBBzAKBggqhkjOPQQDAjASMRAwDgYDVQQDDAdUZXN0IENBMCAXDTIw'
    'MDEwMTAwMDAwMFoYDzIwOTkxMjMxMjM1OTU5WjAaMRgwFgYDVQQDDA9jbGllbnQgb2YgdGVz'
    'dHMwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAARF5nXjJsDmxh5beYSI+aSOTW/7NEnL/Gyi'
    '+g2zJOL8vs4iHKWc5KdF5Y8gX7M598kUQr8kzn7UWKoFzUIIDf9ro00wSzAJBgNVHRMEAjAA'
    'MB0GA1UdDgQWBBSBlg11ZqEGjsX3uIiU5RDOHTxAYDAfBgNVHSMEGDAWgBRYBO5TPKJ70kPQ'
    'YsN82+YYhbQuITAKBggqhkjOPQQDAgNHADBEAiBweQeS4Onosh+LKHZV8JQhm89eJ136nTHy'
    'ab7JVpLWGAIgFihvnsouGCp85d9ehbQY7bcFwkQD8JMhYOzfzB4JzJU=',
    'self':
    'MIIBqDCCAU6gAwIBAgIBCDAKBggqhkjOPQQDAjAYMRYwFAYDVQQDDA1yZWxheS5leGFtcGxl'
    'MCAXDTIwMDEwMTAwMDAwMFoYDzIwOTkxMjMxMjM1OTU5WjAYMRYwFAYDVQQDDA1yZWxheS5l'
    'eGFtcGxlMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAESCLCdyIkqulG+XlgzbpV6+JNSTyD'
    'nvAtMqsFA9HNLaxm/OdS4T7Wtmkv3IhtfNDQWIqjHiN32wou2ObnaeVNNKOBhjCBgzAJBgNV'
    'HRMEAjAAMFcGA1UdEQRQME6CDXJlbGF5LmV4YW1wbGWCEW14MS50aGVyZS5leGFtcGxlghFt'
    'eDIudGhlcmUuZXhhbXBsZYIRbWFpbC5kYW5lLmV4YW1wbGWHBH8AAAEwHQYDVR0OBBYEFHVt'
    '1bvq8c8N/b/X+siY+keqjro8MAoGCCqGSM49BAMCA0gAMEUCIQDQYGX3gIjCbBLpT8bI/0D2'
    'US06p5wxxqtiT/4ZiAc3OgIgW3vPro6c02SPUU3BwYqwxXUSPAfIKkpBNFupyXjvreo='}
KEYS = {
    'server':
    'MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgO+kJjpBsKGQsVIsNtBpfnxWz'
    'nzuDzjTc6fHTpoIDHemhRANCAARF5nXjJsDmxh5beYSI+aSOTW/7NEnL/Gyi+g2zJOL8vs4i'
    'HKWc5KdF5Y8gX7M598kUQr8kzn7UWKoFzUIIDf9r',
    'self':
    'MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgR/fg0O17SGsDK/+Dqo2ut4X7'
    '3MVSwD9nlHhtEm+VFdWhRANCAARIIsJ3IiSq6Ub5eWDNulXr4k1JPIOe8C0yqwUD0c0trGb8'
    '51LhPta2aS/ciG180NBYiqMeI3fbCi7Y5udp5U00'}


def pem_of(kind, text):
    """Base64 in the form that OpenSSL reads."""
    return '-----BEGIN %s-----\n%s\n-----END %s-----\n' % (
        kind, '\n'.join(re.findall('.{1,64}', text)), kind)


PEM = {name: pem_of('CERTIFICATE', text)
       for name, text in CERTIFICATES.items()}
KEYS = {name: pem_of('PRIVATE KEY', text) for name, text in KEYS.items()}


def der(name):
    """A certificate of PEM in DER."""
    return ssl.PEM_cert_to_DER_cert(PEM[name])


def spki(name):
    """The key of a certificate, as a SubjectPublicKeyInfo: an EC P-256 key
    has one of 91 bytes, which begins like this (RFC 5480)."""
    start = der(name).index(binascii.unhexlify('3059301306072a8648ce3d0201'))
    return der(name)[start:start + 91]


def tlsa(usage, selector, matching, name):
    """The TLSA record that means the certificate of that name."""
    data = spki(name) if selector else der(name)
    if matching:
        data = hashlib.new([None, 'sha256', 'sha512'][matching], data).digest()
    return usage, selector, matching, data


class PemFiles:
    """Files for OpenSSL, which reads keys from nowhere else."""

    def __init__(self):
        self.path = None
        self.lock = threading.Lock()

    def __call__(self, name, key=False):
        """The path of a file with these certificates (a+b) and, if wanted,
        the key of the first."""
        with self.lock:
            if self.path is None:
                self.path = tempfile.mkdtemp(prefix='pem-')
                atexit.register(shutil.rmtree, self.path, True)
            path = os.path.join(self.path, name + ('.key' if key else ''))
            if not os.path.exists(path):
                with open(path, 'w') as f:
                    f.write(pem(name, key))
            return path


def pem(name, key=False):
    """The same as text."""
    names = name.split('+')
    return ''.join(PEM[each] for each in names) + (
        KEYS.get(names[0], KEYS['server']) if key else '')


pem_file = PemFiles()


def tls_server(text):
    """(SSLContext of a server, name that must be asked for or None): see
    FakeSMTP.  Raises ssl.SSLError or ValueError if OpenSSL cannot do it."""
    name, *words = text.split()
    context, wanted = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), None
    for word in words:
        if word == 'client':
            context.load_verify_locations(cadata=PEM['ca'])
            context.verify_mode = ssl.CERT_REQUIRED
        elif word == '1.2':
            with warnings.catch_warnings():     # deprecated
                warnings.simplefilter('ignore')
                context.options |= getattr(ssl, 'OP_NO_TLSv1_3', 0)
        elif word.startswith('ciphers='):
            context.set_ciphers(word[8:])
        elif word.startswith('name='):
            wanted = word[5:]
        elif word != '-':
            raise ValueError('no such word: ' + word)
    if name != 'anonymous':
        context.load_cert_chain(pem_file(name, key=True))
    return context, wanted


def offers_tls13(hello):
    """Whether a ClientHello, one record, has TLS 1.3 among its versions
    (RFC 8446 4.1.2, 4.2.1)."""
    at = 5 + 4 + 2 + 32                     # headers, version, random
    at += 1 + hello[at]                     # session
    at += 2 + int.from_bytes(hello[at:at + 2], 'big')   # ciphers
    at += 1 + hello[at] + 2                 # compression; extensions
    while at < len(hello):
        kind, size = struct.unpack_from('>HH', hello, at)
        if kind == 43:
            return b'\3\4' in hello[at + 5:at + 4 + size]
        at += 4 + size
    return False


class FakeSMTP:
    """A scripted SMTP server on loopback, in a thread of its own.

    script is text, or a list of texts, one per connection in order; a
    connection more or less than that is an error.  Its lines:

      S: text        send text and CRLF
      s: text        send text with Python's escapes decoded, no CRLF added
      C: text        expect exactly this line (a final * stands for any rest)
      D:             read message data up to CRLF.CRLF, into .messages
      T:             read message data up to the end of the stream, where no
                     end of data may come, into .messages
      R: n           read n raw bytes
      Q:             take an optional QUIT, then the end of the stream
      flood: text xN send text and CRLF N times
      fill: text xN  send text N times
      drip: text     send text and CRLF, one byte each 0.2 seconds
      sleep 0.3      do nothing for 0.3 seconds
      alone          nothing more may come before the next reply
      turns n        since the greeting the server must have had to wait for
                     the client n times
      narrow         (at the start) a receive window of about 1 KiB, and as
                     little room for what it sends
      hang           stay silent until the client leaves
      stall          the same with a tiny receive buffer, reading nothing
      close, reset   end the connection, with FIN or with RST
      TLS: name words   the handshake, now, with the certificates name: one
                        or more of PEM, as a+b, or `anonymous`; words are
                        `client` (wants a certificate of the CA), `1.2`
                        (nothing newer), `ciphers=...`, `name=...` (the name
                        that the client must ask for; - for none), `-`
                        (nothing: another context, with other ticket keys)
      noTLS: the same   the same, but the client has to break it off
      old: the same     the same as TLS:, but it hangs if TLS 1.3 is offered,
                        as servers do at the large hello that comes with it
      half: the same    sends half of its first flight, and closes
      bye               end of TLS (close_notify) and of the connection
      drop              read what comes until the end of the stream, in
                        which no SMTP may be

    Blank lines and lines that start with # are skipped.  The end of the
    script closes the connection.  After TLS the other lines speak through
    it; close and the end of the script then come without a close_notify.

    After close(), which is also what leaving the with block does, these
    tell what happened: transcript (readable lines), commands (lines
    received, as bytes), messages (wire bytes, final dot line taken off),
    connections (a number), error (None, or the first mismatch).  No wait is
    longer than LIMIT seconds.
    """

    LIMIT = 30
    context = staticmethod(tls_server)

    def __init__(self, script='', host='127.0.0.1', port=0):
        scripts = [script] if isinstance(script, str) else list(script)
        self._scripts = [self._parse(text) for text in scripts]
        self.transcript, self.commands, self.messages = [], [], []
        self.connections, self.error, self.callers = 0, None, []
        self._sock, self._over = None, threading.Event()
        family = socket.AF_INET6 if ':' in host else socket.AF_INET
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        words = {word for steps in self._scripts for word, _ in steps}
        if 'stall' in words or 'narrow' in words:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF,
                                      1024 if 'narrow' in words else 2048)
        if 'narrow' in words:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF,
                                      1024)
        try:
            self._listener.bind((host, port))
            self._listener.listen(16)
        except OSError:
            self._listener.close()
            raise
        self.host, self.port = host, self._listener.getsockname()[1]
        self.address = '%s:%d' % ('[%s]' % host if ':' in host else host,
                                  self.port)
        self._wake, self._waker = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Lets a connection that is under way come to its end, for two
        seconds, then stops.  Safe to call twice."""
        if self._over.is_set():
            return
        self._over.set()
        self._waker.send(b'x')
        self._thread.join(2)
        if self._thread.is_alive():
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            self._thread.join(4)
        for sock in (self._listener, self._wake, self._waker):
            sock.close()
        if self.connections < len(self._scripts):
            self._fail('%d connections instead of %d' % (
                self.connections, len(self._scripts)))

    # The thread, and the script.

    def _parse(self, text):
        steps = []
        for line in text.splitlines():
            line = line.lstrip()
            if line and not line.startswith('#'):
                word, colon, rest = line.partition(':')
                if colon:
                    rest = rest[1:] if rest.startswith(' ') else rest
                else:
                    word, _, rest = line.partition(' ')
                if not hasattr(self, '_do_' + word):
                    raise ValueError('no such step: ' + line)
                steps.append((word, rest))
        return steps

    def _fail(self, text):
        self.transcript.append('-- ' + text)
        self.error = self.error or text

    def _serve(self):
        while self._listener in select.select([self._listener, self._wake],
                                              [], [])[0]:
            self._sock, caller = self._listener.accept()
            self.callers.append(caller[0])
            self._sock.settimeout(self.LIMIT)
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._buffer, self._turns, self._spoke = b'', 0, False
            self._tls = self._incoming = self._outgoing = None
            self.connections += 1
            if self.connections > 1:
                self.transcript.append('-- connection %d' % self.connections)
            try:
                if self.connections > len(self._scripts):
                    raise Mismatch('a connection more than expected')
                for word, rest in self._scripts[self.connections - 1]:
                    getattr(self, '_do_' + word)(rest)
            except Gone as e:
                self.transcript.append('-- %s' % e)
            except Mismatch as e:
                self._fail(str(e))
            except Exception as e:
                self._fail('fault in the fake: %r' % e)
            finally:
                self._sock.close()

    # The only code that touches the connection.

    def _receive_raw(self):
        try:
            return self._sock.recv(65536)
        except OSError as e:
            raise Gone('lost: %s' % e)

    def _send_raw(self, data):
        try:
            self._sock.sendall(data)
        except OSError as e:
            raise Gone('lost: %s' % e)

    def _receive(self):
        """Some bytes; none at the end of the stream."""
        self._turns += self._spoke
        self._spoke = False
        while self._tls:
            try:
                return self._tls.read(65536)
            except ssl.SSLWantReadError:
                self._flush()
            except ssl.SSLEOFError:
                return b''
            except ssl.SSLError as e:
                raise Gone('TLS: %s' % e)
            self._feed()
        return self._receive_raw()

    def _send(self, data):
        self._spoke = True
        if not self._tls:
            self._send_raw(data)
            return
        for at in range(0, len(data), 65536):
            self._tls.write(data[at:at + 65536])
            self._flush()

    def _feed(self):
        data = self._receive_raw()
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    def _flush(self):
        data = self._outgoing.read()
        if data:
            self._send_raw(data)

    # The steps.

    def _line(self):
        while b'\n' not in self._buffer:
            data = self._receive()
            if not data:
                if self._buffer:
                    raise Mismatch('half a line at the end of the stream: %r'
                                   % self._buffer)
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b'\n')
        self.transcript.append('C: ' + line[:-1].decode('utf-8', 'replace'))
        if line[-1:] != b'\r' or b'\r' in line[:-1]:
            raise Mismatch('a line that does not end in CRLF: %r' % line)
        self.commands.append(line[:-1])
        return line[:-1]

    def _do_S(self, text):
        self.transcript.append('S: ' + text)
        self._send(text.encode('utf-8') + b'\r\n')

    def _do_s(self, text):
        self.transcript.append('s: ' + text)
        self._send(text.encode('latin-1').decode('unicode_escape')
                   .encode('latin-1'))

    def _do_C(self, text):
        line, wanted = self._line(), text.encode('utf-8')
        if line is None:
            raise Mismatch('end of the stream instead of %r' % wanted)
        if line != wanted and not (wanted.endswith(b'*') and
                                   line.startswith(wanted[:-1])):
            raise Mismatch('%r instead of %r' % (line, wanted))

    def _message(self, data, whole=True):
        self.messages.append(data)
        self.transcript.append('D: %d bytes' % len(data))
        if not whole and data.endswith(b'\r'):
            data += b'\n'               # cut between CR and LF
        if re.search(b'\r(?!\n)|(?<!\r)\n', data):
            raise Mismatch('a lone CR or LF in the message')

    def _do_D(self, _):
        data, self._buffer = bytearray(b'\r\n' + self._buffer), b''
        seen = 0
        while True:
            end = data.find(b'\r\n.\r\n', max(0, seen - 4))
            if end >= 0:
                break
            seen = len(data)
            more = self._receive()
            if not more:
                raise Mismatch('end of the stream in the message')
            data += more
        self._buffer = bytes(data[end + 5:])
        self._message(bytes(data[2:end + 2]))

    def _rest(self):
        """All that comes until the connection is over."""
        data, self._buffer, more = self._buffer, b'', b'x'
        try:
            while more:
                more = self._receive()
                data += more
        except Gone as e:
            self.transcript.append('-- %s' % e)
        return data

    def _do_T(self, _):
        data = self._rest()
        if b'\r\n.\r\n' in b'\r\n' + data:
            raise Mismatch('an end of data that must not come')
        self._message(data, whole=False)

    def _do_drop(self, _):
        data = self._rest()
        self.transcript.append('-- dropped %d bytes' % len(data))
        for word in (b'AUTH', b'MAIL', b'EHLO', b'QUIT'):
            if word in data:
                raise Mismatch('%r before TLS' % data)

    def _do_R(self, text):
        while len(self._buffer) < int(text):
            data = self._receive()
            if not data:
                raise Mismatch('end of the stream instead of raw bytes')
            self._buffer += data
        self._buffer = self._buffer[int(text):]
        self.transcript.append('R: %s bytes' % text)

    def _do_Q(self, _):
        try:
            line = self._line()
            if line == b'QUIT':
                line = self._line()
        except Gone:
            return
        if line is not None:
            raise Mismatch('%r instead of the end' % line)

    def _do_flood(self, text, end=b'\r\n'):
        self.transcript.append('S: %s, flooding' % text)
        text, _, times = text.rpartition(' x')
        left, unit = int(times), text.encode('utf-8') + end
        block = max(1, 65536 // len(unit))
        while left > 0:
            self._send(unit * min(block, left))
            left -= block

    def _do_fill(self, text):
        self._do_flood(text, b'')

    def _do_drip(self, text):
        self.transcript.append('S: %s, dripping' % text)
        for byte in text.encode('utf-8') + b'\r\n':
            self._send(bytes([byte]))
            self._over.wait(0.2)

    def _do_sleep(self, text):
        self.transcript.append('-- sleep ' + text)
        self._over.wait(float(text))

    def _do_alone(self, _):
        if self._buffer or select.select([self._sock], [], [], 0.05)[0]:
            raise Mismatch('more than one command: %r' % (
                self._buffer or self._receive()))

    def _do_turns(self, text):
        if self._turns != int(text):
            raise Mismatch('%d turns instead of %s' % (self._turns, text))

    def _do_narrow(self, _):
        pass

    def _do_hang(self, _):
        self.transcript.append('-- silence')
        while self._receive():
            pass
        raise Gone('the client left')

    def _do_stall(self, _):
        self.transcript.append('-- reads nothing')
        self._over.wait(self.LIMIT)

    def _do_close(self, _):
        raise Gone('closed by the server')

    def _do_reset(self, _):
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                              struct.pack('ii', 1, 0))
        raise Gone('reset by the server')

    # TLS

    def _begin(self, text, hello=b''):
        """Everything before the handshake: (names asked for, name that
        must be, TLS)."""
        context, wanted = self.context(text)
        asked = []

        def name_asked(connection, name, context):
            asked.append(name)
        if hasattr(context, 'sni_callback'):
            context.sni_callback = name_asked
        else:
            context.set_servername_callback(name_asked)
        if self._buffer:
            raise Mismatch('%r before the handshake' % self._buffer)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._incoming.write(hello)
        return asked, wanted, context.wrap_bio(
            self._incoming, self._outgoing, server_side=True)

    def _handshake(self, text, hello=b''):
        """The error that it ends with, or None."""
        asked, wanted, connection = self._begin(text, hello)
        self.transcript.append('-- TLS with ' + text)
        self._tls = connection
        while True:
            try:
                connection.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._flush()
                self._feed()
            except OSError as e:            # SSLError, or the line is lost
                self._flush()
                return '%s' % e
        self._flush()
        if connection.session_reused:
            self.transcript.append('-- resumed')
        asked = [name for name in asked if name] or ['-']
        if wanted and asked != [wanted]:
            raise Mismatch('TLS for %s instead of %s' % (asked, wanted))
        return None

    def _do_TLS(self, text, hello=b''):
        error = self._handshake(text, hello)
        if error:
            raise Mismatch('TLS failed: ' + error)

    def _do_old(self, text):
        hello = self._receive()
        if offers_tls13(hello):
            self._do_hang('')
        self._do_TLS(text, hello)

    def _do_noTLS(self, text):
        """In TLS 1.3 the client's last word may be too late to see."""
        try:
            error = self._handshake(text)
        except Gone as e:
            error = str(e)
        try:
            data = b'' if error else self._receive()
        except Gone:
            data = b''
        if data:
            raise Mismatch('%r after TLS that had to fail' % data)
        raise Gone('no TLS: %s' % error)

    def _do_half(self, text):
        connection = self._begin(text)[-1]
        while not self._outgoing.pending:
            try:
                self._feed()
                connection.do_handshake()
            except ssl.SSLWantReadError:
                continue
        data = self._outgoing.read()
        self._send(data[:len(data) // 2])
        raise Gone('closed in the handshake')

    def _do_bye(self, _):
        try:
            self._tls.unwrap()
        except ssl.SSLError:
            pass                            # it wants an answer
        self._flush()
        raise Gone('TLS and connection closed')


# ------------------------------------------------------------ Pure tables
# What a function makes of what it is given, one line each.  Nothing is
# patched: where the program takes a clock, a resolver or a socket as an
# argument, it gets one that a test can see through.

def has_ipv6():
    """Whether there is a ::1 to talk to."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.bind(('::1', 0))
    except OSError:
        return False
    return True


HAS_IPV6 = has_ipv6()


def foreign(*addresses):
    """The first of these addresses, for documentation, that is not this
    host's after all."""
    for address in addresses:
        family = socket.AF_INET6 if ':' in address else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.bind((address, 0))
        except OSError:
            return address.encode()
    return addresses[0].encode()


FOREIGN = foreign('192.0.2.1', '198.51.100.1', '203.0.113.1')
FOREIGN_IPV6 = foreign('2001:db8::1', '2001:db8::2', '2001:db8::3')


class Tables(unittest.TestCase):
    """Checks of one line.  A Report counts as its text, so that a table can
    say what the administrator will read."""

    def check(self, want, function, *args):
        """function(*args) must be want, or raise want if that is an
        exception class."""
        shown = ', '.join(repr(argument)[:70] for argument in args)
        with self.subTest('%s(%s)' % (
                getattr(function, '__name__', 'it'), shown)):
            try:
                got = function(*args)
            except qr.LocalFault as fault:
                got = fault.report
            except (qr.Invalid, qr.Malformed, qr.ConnectionLost, qr.TimedOut,
                    OSError, ValueError) as error:
                got = type(error)
                if want in (OSError, qr.ConnectionLost) and \
                        issubclass(got, want):
                    got = want
            if got != want:
                self.fail('%.400r instead of %.400r' % (got, want))


class VirtualClock:
    """A clock that moves only when somebody waits: to the deadline if
    nothing is ready, otherwise by step."""

    def __init__(self, now=1000.0, step=0.0):
        self.now, self.step = now, step

    def __call__(self):
        return self.now

    def wait(self, reading, writing, deadline):
        """For real sockets and descriptors."""
        if self.now >= deadline:
            raise qr.TimedOut()
        ready = select.select(reading, writing, (), 0)[:2]
        if not any(ready):
            self.now = deadline
            raise qr.TimedOut()
        self.now += self.step
        return ready

    def at_once(self, reading, writing, deadline):
        """For sockets that are always ready, after a step."""
        if self.now >= deadline:
            raise qr.TimedOut()
        self.now += self.step
        return list(reading), list(writing)


def value_of(kind, **fields):
    """One of the program's values from named fields; the others None."""
    unknown = set(fields) - set(kind.__slots__)
    if unknown:
        raise TypeError('no such fields: %s' % unknown)
    return kind(*[fields.get(name) for name in kind.__slots__])


def control_files(**fields):
    """A Control without any control file but me, or with these fields."""
    default = dict(helohost=ME, timeoutconnect=5, timeoutremote=5,
                   smtproutes={}, authsenders={}, moreipme=[],
                   notipme=[], outgoingip={}, batch=50)
    default.update(fields)
    return value_of(qr.Control, **default)


def converse_on(connection, server, policy, envelope=None, message=None,
                route=None, **control):
    """The Result of one session on a Connection."""
    def make_tls_context(policy):
        return qr.tls_context(policy, qr.TlsControl(None, False, None, b''))
    attempt = qr.ServerTry(
        server, route or value_of(qr.Route), envelope,
        control_files(**control), context_of(
            message=message, tls_control=lambda name: None))
    return attempt.converse(connection, qr.TlsSetup(
        policy, make_tls_context, None, b''))


def redactor(secrets, user=b''):
    """A Redactor that knows these."""
    result = qr.Redactor()
    result.user, result.secrets = user, list(secrets)
    return result


def context_of(**fields):
    """A Context without what is not named, and with no trace."""
    default = dict(trace=qr.NO_TRACE, tls_context=qr.tls_context,
                   is_own=lambda address: False)
    default.update(fields)
    return value_of(qr.Context, **default)


# Control files

class ControlFiles(Tables):

    def test_values(self):
        """Values compare by type and fields, and show both."""
        server = qr.NameServer(2, ('192.0.2.1', 53))
        self.assertEqual(server, qr.NameServer(2, ('192.0.2.1', 53)))
        self.assertNotEqual(server, qr.NameServer(2, ('192.0.2.2', 53)))
        self.assertNotEqual(server, (2, ('192.0.2.1', 53)))
        self.assertIn('192.0.2.1', repr(server))
        for fields in (2,), (2, ('192.0.2.1', 53), True):
            self.assertRaises(TypeError, qr.NameServer, *fields)

    def test_first_line(self):
        for data, want in (
                (b'', b''), (b'\n', b''), (b'a', b'a'), (b'a\nb\n', b'a'),
                (b'a \t \nb', b'a'), (b' a b \n', b' a b'),
                (b'\na\n', b''), (b'a\r\n', b'a\r')):
            self.check(want, qr.first_line, data)

    def test_lines_of(self):
        for data, want in (
                (None, []), (b'', []), (b'\n\n', []), (b' \t\n', []),
                (b'# only\n#comments', []), (b'a\nb', [b'a', b'b']),
                (b'a \t\n\n#b\nc#d\n', [b'a', b'c#d']),
                (b' # indented\n', [b' # indented'])):
            self.check(want, qr.lines_of, data)

    def test_parse_number(self):
        """Leading ASCII digits, from 1 to a day; else the default, 60."""
        for data, want in (
                (None, 60), (b'', 60), (b'\n', 60), (b'7', 7), (b'7\n', 7),
                (b'7\r\n', 7), (b'7\n8\n', 7), (b'007', 7), (b'0', 1),
                (b'-5', 60), (b'+5', 60), (b' 7', 60), (b'1_0', 1),
                ('²'.encode(), 60), ('٣'.encode(), 60), (b'0x10', 1),
                (b'60 seconds', 60), (b'5 minutes', 5), (b'1e9', 1),
                (b'86400', 86400), (b'86401', 86400), (b'seven', 60),
                (b'9' * 5000, 86400), (b'0' * 5000, 1),
                (b'0' * 5000 + b'9', 9), (b'7\0' + b'9', 7)):
            self.check(want, qr.parse_number, data, 60)

    def test_parse_helohost(self):
        for data, want in (
                (b'me.example\n', b'me.example'),
                (b'me.example \t\nother', b'me.example'),
                (b'[192.0.2.1]', b'[192.0.2.1]'),
                (None, qr.Invalid), (b'', qr.Invalid), (b'\n', qr.Invalid),
                (b' \t\n', qr.Invalid), (b'me\r\n', qr.Invalid),
                (b'me\rMAIL', qr.Invalid), (b'me\0', qr.Invalid),
                (b' me.example', qr.Invalid), (b'\tme', qr.Invalid),
                (b'me example', qr.Invalid), (b'me\texample', qr.Invalid),
                (b'me\x01', qr.Invalid), (b'me\x1b[0m', qr.Invalid),
                (b'me\x7f', qr.Invalid), (b'me>', qr.Invalid),
                (b'm\xc3\xa9.example', b'm\xc3\xa9.example')):
            self.check(want, qr.parse_helohost, data)

    def test_parse_networks(self):
        """What moreipme and notipme say of 192.0.2.1, of 2001:db8::1."""
        def holds(data):
            networks = qr.parse_networks(data)
            return tuple(qr.in_networks(address, networks) for address in
                         (b'192.0.2.1', b'2001:db8::1'))
        neither, both = (False, False), (True, True)
        four, six = (True, False), (False, True)
        for data, want in (
                (None, neither), (b'# none\n\n', neither),
                (b'192.0.2.1', four), (b'192.0.2.1 \n192.0.2.1\n', four),
                (b'[192.0.2.1]', four), (b'::ffff:192.0.2.1', four),
                (b'2001:DB8:0:0::1\n', six), (b'[2001:db8::1]', six),
                (b'192.0.2.1\n2001:db8::1', both),
                (b'192.0.2.2\n2001:db8::2\n', neither),
                # networks
                (b'192.0.2.0/24', four), (b'192.0.3.0/24', neither),
                (b'192.0.2.77/24', four), (b'192.0.2.0/31', four),
                (b'192.0.2.2/31', neither), (b'192.0.2.1/32', four),
                (b'0.0.0.0/0', four), (b'::/0', six),
                (b'192.0.0.0/255.255.0.0', four),
                (b'192.0.2.0/255.255.255.254', four),
                (b'192.0.2.0/255.255.255.255', neither),
                (b'0.0.2.0/0.0.255.0', four),
                (b'2001:db8::/32', six), (b'2001:db8::/128', neither),
                (b'2001:db9::/32', neither),
                # nonsense
                (b'192.0.2\n', qr.Invalid), (b'a.example\n', qr.Invalid),
                (b'192.0.2.1 192.0.2.2', qr.Invalid), (b'\xff', qr.Invalid),
                (b'192.0.2.1\r\n', qr.Invalid), (b'/', qr.Invalid),
                (b'192.0.2.1/', qr.Invalid), (b'192.0.2.1/33', qr.Invalid),
                (b'192.0.2.1/-1', qr.Invalid), (b'192.0.2.1/x', qr.Invalid),
                (b'192.0.2.1/8/8', qr.Invalid), (b'/24', qr.Invalid),
                ('192.0.2.1/²'.encode(), qr.Invalid),
                (b'192.0.2.1/' + b'9' * 5000, qr.Invalid),
                (b'2001:db8::1/129', qr.Invalid),
                (b'2001:db8::1/ffff::', qr.Invalid),
                (b'10.0.0.0/::1', qr.Invalid)):
            self.check(want, holds, data)

    def test_read_file(self):
        with Home(empty=b'', largest=bytes(1000), larger=bytes(1001),
                  huge=bytes((1 << 20) + 1), some=b'a\0b\r\n') as home:
            def read(name, most=1000):
                return qr.read_file(os.path.join(
                    home.path, 'control', name).encode(), most)
            os.mkfifo(os.path.join(home.path, 'control', 'fifo'))
            for name, target in (('null', '/dev/null'),
                                 ('zero', '/dev/zero'), ('link', 'some'),
                                 ('dangling', 'nowhere'), ('loop', 'loop'),
                                 ('chain', 'dangling'), ('here', '.'),
                                 ('long', 'x' * 300)):
                os.symlink(target, os.path.join(home.path, 'control', name))
            self.check(None, read, 'absent')
            self.check(None, read, 'absent/too')
            self.check(None, read, 'here/absent')
            self.check(None, read, 'x' * 300)
            self.check(b'a\0b\r\n', read, 'here/some')
            # A link that leads nowhere is an entry, on the way there, too.
            for name in ('dangling', 'chain', 'long', 'here/dangling',
                         'dangling/file', 'chain/file', 'long/file',
                         'here/dangling/file', 'dangling/' + 'x' * 300):
                self.check(OSError, read, name)
            self.check(b'', read, 'empty')
            self.check(b'a\0b\r\n', read, 'some')
            self.check(b'a\0b\r\n', read, 'link')
            self.check(b'', read, 'null')
            self.check(bytes(1000), read, 'largest')
            self.check(qr.Invalid, read, 'larger')
            self.check(qr.Invalid, read, 'huge', qr.CONTROL_MAX)
            self.check(qr.Invalid, read, 'zero')
            self.check(qr.Invalid, read, 'fifo')
            self.check(qr.Invalid, read, '.')
            self.check(OSError, read, 'loop')
            self.check(NotADirectoryError, read, 'some/thing')

    @unittest.skipIf(os.getuid() == 0, 'root can read everything')
    def test_read_file_without_permission(self):
        with Home(secret=b'x') as home:
            path = os.path.join(home.path, 'control', 'secret')
            os.chmod(path, 0)
            self.check(PermissionError, qr.read_file, path.encode(), 9)

    def read_control(self, home):
        with inside(home):
            return qr.read_control()

    def test_read_control(self):
        with Home(timeoutconnect=None, timeoutremote=None) as home:
            def field(name):
                return getattr(self.read_control(home), name)
            for name, want in (
                    ('helohost', ME), ('timeoutconnect', 60),
                    ('timeoutremote', 1200), ('smtproutes', {}),
                    ('authsenders', {}), ('moreipme', []),
                    ('notipme', [])):
                self.check(want, field, name)
            home.write('helohost', b'helo.example\n')
            home.write('me', None)
            self.check(b'helo.example', field, 'helohost')
            home.write('timeoutconnect', b'7\n')
            home.write('timeoutremote', b'0\n')
            home.write('moreipme', b'192.0.2.1\n')
            home.write('notipme', b'192.0.2.2\n')
            home.write('smtproutes', b':relay.example\n')
            for name, want in (
                    ('helohost', b'helo.example'), ('timeoutconnect', 7),
                    ('timeoutremote', 1),
                    ('moreipme', qr.parse_networks(b'192.0.2.1')),
                    ('notipme', qr.parse_networks(b'192.0.2.2'))):
                self.check(want, field, name)
            self.assertEqual(b'relay.example', field('smtproutes')[b''].relay)

    def test_unreadable_control(self):
        """Whatever exists and cannot be read or understood defers."""
        for name, bad in (
                ('me', None), ('me', b''), ('me', b'a\0b'),
                ('helohost', b''), ('helohost', b'\n' + ME),
                ('smtproutes', b':relay.example:0\n'),
                ('authsenders', b':relay.example:x|a|b\n'),
                ('moreipme', b'?'), ('notipme', b'?'),
                ('smtproutes', b'#' * (qr.CONTROL_MAX + 1))):
            with Home(**{name: bad}) as home:
                self.check(qr.NO_CONTROL, self.read_control, home)
        for name in ('me', 'helohost', 'timeoutconnect', 'timeoutremote',
                     'smtproutes', 'authsenders', 'moreipme', 'notipme',
                     'outgoingip', 'batch'):
            with Home(**{name: b'\xef\xbb\xbf192.0.2.1\n'}) as home:
                self.check(qr.NO_CONTROL, self.read_control, home)
            for make in os.mkdir, os.mkfifo, \
                    lambda path: os.symlink('nowhere', path):
                with Home(**{name: None}) as home:
                    make(os.path.join(home.path, 'control', name))
                    self.check(qr.NO_CONTROL, self.read_control, home)
        with Home(me=None, helohost=ME) as home:    # me is always read
            self.check(ME, lambda: self.read_control(home).helohost)
            os.mkdir(os.path.join(home.path, 'control', 'me'))
            self.check(qr.NO_CONTROL, self.read_control, home)
        with Home() as home:                # a file in the directory's place
            shutil.rmtree(os.path.join(home.path, 'control'))
            open(os.path.join(home.path, 'control'), 'w').close()
            self.check(qr.NO_CONTROL, self.read_control, home)


    def test_signature(self):
        """It differs when a file comes, changes or goes, when a link comes
        that leads nowhere, and when what it leads to comes."""
        for name in ('smtproutes', 'authsenders', 'tlsclientciphers',
                     'clientcert.pem'):
            with Home() as home, inside(home):
                path = os.path.join('control', name)
                seen = [qr.control_signature()]
                for change in (
                        lambda: os.symlink('elsewhere', path),
                        lambda: home.write('elsewhere', b'1'),
                        lambda: home.write('elsewhere', b'22'),
                        lambda: os.unlink('control/elsewhere'),
                        lambda: os.rename('control/me', path)):
                    change()
                    self.assertNotEqual(seen[-1], qr.control_signature())
                    seen.append(qr.control_signature())
                self.assertEqual(seen[1], seen[4])


class Routes(Tables):

    def route(self, value):
        """(relay, port, credentials) of a route; what is lacking in the
        place of incomplete credentials."""
        route = qr.parse_route(value)
        return self.fields(route)

    @staticmethod
    def fields(route):
        assert not (route.credentials and route.lacking)
        return route.relay, route.port, route.credentials or \
            route.lacking or None

    def test_parse_route(self):
        for value, relay, port, credentials in (
                (b'', None, None, None),
                (b'a.example', b'a.example', None, None),
                (b'A.Example.', b'A.Example.', None, None),
                (b'a.example:26', b'a.example', 26, None),
                (b'a.example;26', b'a.example', 26, None),
                (b'a.example:1', b'a.example', 1, None),
                (b'a.example:65535', b'a.example', 65535, None),
                (b':26', None, 26, None),
                (b'192.0.2.1:26', b'192.0.2.1', 26, None),
                (b'[192.0.2.1]', b'[192.0.2.1]', None, None),
                (b'[192.0.2.1]:26', b'[192.0.2.1]', 26, None),
                (b'[2001:db8::1]', b'[2001:db8::1]', None, None),
                (b'[2001:db8::1]:26', b'[2001:db8::1]', 26, None),
                (b'[2001:db8::1];26', b'[2001:db8::1]', 26, None),
                (b'a|u|p', b'a', None, (b'u', b'p')),
                (b'a:26|u|p', b'a', 26, (b'u', b'p')),
                (b'[::1]:26|u|p', b'[::1]', 26, (b'u', b'p')),
                # the password is the rest of the line
                (b'a|u|p|:|q:26', b'a', None, (b'u', b'p|:|q:26')),
                (b'a|u:v|p', b'a', None, (b'u:v', b'p')),
                (b'a|u||', b'a', None, (b'u', b'|')),
                (b'a|u| p', b'a', None, (b'u', b' p')),
                (b'a|\xc3\xbc|\xff', b'a', None, (b'\xc3\xbc', b'\xff')),
                # user and password, or neither
                (b'a|u|', b'a', None, b'password'),
                (b'a|u', b'a', None, b'password'),
                (b'a||p', b'a', None, b'user'),
                (b'a|', b'a', None, b'password'),
                (b'a:26|u', b'a', 26, b'password'),
                (b'|u|p', None, None, (b'u', b'p'))):
            self.check((relay, port, credentials), self.route, value)

    def test_bad_routes(self):
        for place in (
                b'a:0', b'a:65536', b'a:abc', b'a:-1', b'a:', b'a;', b'a:+1',
                b'a: 26', b'a:26 x', b'a:1_0', b'a:26:27',
                'a:²'.encode(), b'a:' + b'9' * 5000, b':0',
                b'2001:db8::1', b'::1', b'[2001:db8::1', b'[::1]26',
                b'[192.0.2.300]', b'[192.0.2]', b'[]', b'[a.example]',
                b'a b', b'a..b', b'.', b'<a>', b'x' * 64,
                b'a\r', b'a\0', b'\xff'):
            self.check(qr.Invalid, qr.parse_route, place)
            self.check(qr.Invalid, qr.parse_route, place + b'|u|p')
        for secret in (b'a|u\r|p', b'a|u|p\r', b'a|u|p\rQUIT', b'a|u\0|p',
                       b'a|u|p\0'):
            self.check(qr.Invalid, qr.parse_route, secret)

    def routes(self, data):
        """{domain: (relay, port, credentials)}"""
        return {domain: self.fields(route)
                for domain, route in qr.parse_routes(data).items()}

    def test_parse_routes(self):
        for data, want in (
                (None, {}), (b'', {}), (b'# a:b\n\n', {}),
                (b'no colon\n', {}),
                (b'Inside.AF.mil:firewall.af.mil:26\n',
                 {b'inside.af.mil': (b'firewall.af.mil', 26, None)}),
                (b'.af.mil:\n', {b'.af.mil': (None, None, None)}),
                (b':heaven.af.mil', {b'': (b'heaven.af.mil', None, None)}),
                (b'a:b \t\n', {b'a': (b'b', None, None)}),
                # the last duplicate wins
                (b'a:b\nA:c\n', {b'a': (b'c', None, None)}),
                (b'a:b|u|p\n', {b'a': (b'b', None, (b'u', b'p'))}),
                (b'a::26\n', {b'a': (None, 26, None)}),
                # a literal has colons of its own
                (b'[IPv6:::1]:b\n', {b'[ipv6:::1]': (b'b', None, None)}),
                (b'[::1]:[::2]:26', {b'[::1]': (b'[::2]', 26, None)}),
                (b'[::1]', {}), (b'a[:b', {b'a[': (b'b', None, None)}),
                (b'a[b:[::1]:26', {b'a[b': (b'[::1]', 26, None)}),
                # keys are compared as DNS does
                (b'B\xc3\x9ccher.example.:b',
                 {b'xn--bcher-kva.example': (b'b', None, None)}),
                (b'.b\xc3\xbccher:b',
                 {b'.xn--bcher-kva': (b'b', None, None)}),
                (b'.:b', {b'.': (b'b', None, None)}),
                (b'\xff.:b', {b'\xff': (b'b', None, None)}),
                # a blank at the beginning would match nothing
                (b' # a:b\n\t#\n \t \n', {}),
                (b'x:y\n a:b\n', qr.Invalid), (b'\ta:b', qr.Invalid),
                (b' :b', qr.Invalid), (b' no colon', qr.Invalid),
                (b'a :b', qr.Invalid), (b'a\t:b', qr.Invalid),
                (b'a:b\r\n', qr.Invalid), (b'a:b\nc:d:0\n', qr.Invalid),
                (b'a:b:0\na:b\n', qr.Invalid)):
            self.check(want, self.routes, data)

    def senders(self, data):
        """As routes(); LOGIN in the place of a relay: login_only."""
        return {sender: ('LOGIN',) * route.login_only +
                self.fields(route)[route.login_only:]
                for sender, route in qr.parse_senders(data).items()}

    def test_parse_senders(self):
        LOGIN = 'LOGIN'
        generic, other = (b'generic', b'passwd'), (b'other', b'otherpw')
        test = b'test', b'testpass'
        for data, want in (
                (None, {}), (b'# a\n\nno colon, no bar\n', {}),
                (b'@example.com|generic|passwd\n',
                 {b'@example.com': (LOGIN, None, generic)}),
                (b'.subdomain.example.com|other|otherpw\n',
                 {b'.subdomain.example.com': (LOGIN, None, other)}),
                (b'mail@example.com|test|testpass\n',
                 {b'mail@example.com': (LOGIN, None, test)}),
                (b'info@example.com:smtp.example.com:26|other|otherpw\n',
                 {b'info@example.com': (b'smtp.example.com', 26, other)}),
                (b':mailrelay.example.com|e=mc2|testpass\n',
                 {b'': (b'mailrelay.example.com', None,
                        (b'e=mc2', b'testpass'))}),
                (b'|u|p', {b'': (LOGIN, None, (b'u', b'p'))}),
                (b'A@B|U|P', {b'a@b': (LOGIN, None, (b'U', b'P'))}),
                (b'a@b|u|p|:|q', {b'a@b': (LOGIN, None, (b'u', b'p|:|q'))}),
                (b'a@b|u:x|p', {b'a@b': (LOGIN, None, (b'u:x', b'p'))}),
                (b'a@b:r|u|p:26', {b'a@b': (b'r', None, (b'u', b'p:26'))}),
                (b'a@b|u', {b'a@b': (LOGIN, None, b'password')}),
                (b'a@b|u|', {b'a@b': (LOGIN, None, b'password')}),
                (b'a@b||p', {b'a@b': (LOGIN, None, b'user')}),
                (b'a@b:|u', {b'a@b': (LOGIN, None, b'password')}),
                (b'a@b::26|u', {b'a@b': (None, 26, b'password')}),
                (b'a@b:r|u', {b'a@b': (b'r', None, b'password')}),
                (b'a@b:r', {b'a@b': (b'r', None, None)}),
                (b'a@b:', {b'a@b': (None, None, None)}),
                (b'a@b:|u|p', {b'a@b': (LOGIN, None, (b'u', b'p'))}),
                (b'a@b:[::1]:26|u|p', {b'a@b': (b'[::1]', 26, (b'u', b'p'))}),
                (b'a@b:r\na@B:s\n', {b'a@b': (b's', None, None)}),
                # senders with a literal
                (b'a@[IPv6:::1]:r|u|p',
                 {b'a@[ipv6:::1]': (b'r', None, (b'u', b'p'))}),
                (b'@[::1]:[::2]:26|u|]:[',
                 {b'@[::1]': (b'[::2]', 26, (b'u', b']:['))}),
                (b'a@[::1]|u|p', {b'a@[::1]': (LOGIN, None, (b'u', b'p'))}),
                (b'a@[::1]:', {b'a@[::1]': (None, None, None)}),
                (b'a@[192.0.2.1]:r', {b'a@[192.0.2.1]': (b'r', None, None)}),
                (b'a[@b:[::1]:26', {b'a[@b': (b'[::1]', 26, None)}),
                (b'a[@b:r|u]|p', {b'a[@b': (b'r', None, (b'u]', b'p'))}),
                (b'a]@b:r', {b'a]@b': (b'r', None, None)}),
                # a blank at the beginning would match nothing
                (b' # a@b:r\n', {}), (b' a@b:r|u|p', qr.Invalid),
                (b'\ta@b|u|p', qr.Invalid), (b' |u|p', qr.Invalid),
                (b'a@b :r|u|p', qr.Invalid), (b'a@b |u|p', qr.Invalid),
                (b'a b@c:r', {b'a b@c': (b'r', None, None)}),
                (b'a@b|u|p\r\n', qr.Invalid), (b'a@b|u\0|p', qr.Invalid),
                (b'a@b:r:0|u|p', qr.Invalid), (b'a@b:r:x|u|p', qr.Invalid)):
            self.check(want, self.senders, data)

    def test_the_manuals_examples(self):
        """The lines that these tests take for the manual's are there."""
        for line in (
                'inside.af.mil:firewall.af.mil:26', '.af.mil:',
                ':heaven.af.mil', '@example.com|generic|passwd',
                '.subdomain.example.com|other|otherpw',
                'mail@example.com|test|testpass',
                'info@example.com:smtp.example.com:26|other|otherpw',
                ':mailrelay.example.com|e=mc2|testpass'):
            self.assertIn('\n            %s\n' % line, MANUAL)

    def choose(self, smtproutes, authsenders, host, sender):
        route = qr.choose_route(host, sender, control_files(
            smtproutes=qr.parse_routes(smtproutes),
            authsenders=qr.parse_senders(authsenders)))
        return self.fields(route)

    def test_smtproutes(self):
        """The whole host, then its suffixes from the left, then ''."""
        manual = (b'inside.af.mil:firewall.af.mil:26\n.af.mil:\n'
                  b':heaven.af.mil\n')
        order = b'b.c:1\n.b.c:2\n.c:3\n:4\n'
        for routes, host, want in (
                (manual, b'inside.af.mil', (b'firewall.af.mil', 26)),
                (manual, b'INSIDE.af.MIL', (b'firewall.af.mil', 26)),
                (manual, b'x.inside.af.mil', (None, None)),
                (manual, b'www.af.mil', (None, None)),
                (manual, b'af.mil', (b'heaven.af.mil', None)),
                (manual, b'elsewhere', (b'heaven.af.mil', None)),
                (manual, b'', (b'heaven.af.mil', None)),
                (order, b'b.c', (b'1', None)),
                (order, b'a.b.c', (b'2', None)),
                (order, b'z.a.b.c', (b'2', None)),
                (order, b'ab.c', (b'3', None)),
                (order, b'c', (b'4', None)),
                (order, b'b.c.', (b'1', None)),
                (order, b'A.B.C.', (b'2', None)),
                (order, b'.', (b'4', None)),
                (b'b.c.:1\n.b.c.:2\n', b'b.c', (b'1', None)),
                (b'b.c.:1\n.b.c.:2\n', b'a.b.c', (b'2', None)),
                (b'b\xc3\xbccher.c:1\n', b'xn--bcher-kva.c', (b'1', None)),
                (b'xn--BCHER-kva.c:1\n', b'B\xc3\x9cCHER.C.', (b'1', None)),
                (b'bu\xcc\x88cher.c:1\n', b'b\xc3\xbccher.c',
                 (b'1', None)),
                (b'.b\xc3\xbccher.c:1\n', b'a.b\xc3\xbccher.c',
                 (b'1', None)),
                (b'.c:1\n', b'\xc3\xbc.c', (b'1', None)),
                (b'.c:1\n', b'\xff.c', (b'1', None)),
                (b'.:1\n', b'b.c', (None, None)),
                (b'[IPv6:2001:DB8::1]:r\n', b'[IPV6:2001:db8::1]',
                 (b'r', None)),
                (order, b'b.cd', (b'4', None)),
                (b'a:r\n', b'b', (None, None)),
                (b'[192.0.2.1]:r\n', b'[192.0.2.1]', (b'r', None)),
                (b'a::26\n', b'a', (None, 26))):
            self.check(want + (None,), self.choose, routes, b'', host, b'')

    def test_authsenders(self):
        """The whole sender, its parts from each @ and dot, then ''."""
        senders = (b's@a.b.c:1\n@a.b.c:2\n.b.c:3\n.c:4\n:5\n')
        for sender, want in (
                (b's@a.b.c', b'1'), (b'S@A.b.C', b'1'), (b't@a.b.c', b'2'),
                (b'x.s@a.b.c', b'2'), (b't@z.b.c', b'3'), (b't@b.c', b'4'),
                (b't@c', b'5'), (b't.c', b'4'), (b'', b'5'), (b't', b'5')):
            self.check((want, None, None), self.choose, b':r\n', senders,
                       b'host', sender)
        for senders in b's@[IPv6:::1]:1|u|p\n', b'@[IPv6:::1]:1|u|p\n':
            self.check((b'1', None, (b'u', b'p')), self.choose, b':r\n',
                       senders, b'host', b's@[IPv6:::1]')
        self.check((b'r', None, None), self.choose, b':r\n', b'a@b:s\n',
                   b'host', b'')

    def test_long_keys(self):
        """A sender of 200,000 dots takes no second for each table."""
        start = time.process_time()
        self.check((b'2', None, None), self.choose, b'a:1\n.:2\n',
                   b'@x.example:3\n', b'.' * 200000, b'.' * 200000)
        self.assertLess(time.process_time() - start, 1)

    def test_who_wins(self):
        """authsenders beats smtproutes; credentials never go by MX."""
        for smtproutes, authsenders, want in rows('''
                -               -               MX -
                :r:26|u|p       -               r 26 u|p
                :r:26|u|p       :s|me|mine      s - me|mine
                :r:26|u|p       :s              s - -
                :r:26|u|p       |me|mine        r 26 me|mine
                -               |me|mine        MX -
                host:|u|p,:r    |me|mine        MX -
                :r|u|p          |me|            r - no password
                :r|u|p          :s|me           s - no password
                -               |me|            MX -
                :r||p           -               r - no user
                :r|u            |me|mine        r - me|mine
                :r|u            :s              s - -
                :|u             -               MX -
                :|u|p           -               MX -
                ::26|u|p        -               MX 26
                :r|u|p          :|me|mine       r - me|mine
                :r|u|p          a@b:            MX -
                :r|u|p          ::26|me|mine    MX 26
                :r              x@y:s|me|mine   r - -'''):
            relay, port, login = self.choose(*[
                b'' if cell == '-' else cell.encode().replace(b',', b'\n')
                for cell in (smtproutes, authsenders)], b'host', b'a@b')
            port = str(port or '-')
            if relay is None:
                self.assertIsNone(login)
                got = 'MX ' + port
            else:
                got = ' '.join([relay.decode(), port, (
                    '-' if login is None else 'no ' + login.decode()
                    if isinstance(login, bytes) else b'|'.join(
                        login).decode())])
            self.check(want, lambda *_: got, smtproutes, authsenders)


# Addresses

class AddressTables(Tables):

    def test_quote(self):
        for box, want in (
                (b'a', b'a'), (b'a.b', b'a.b'), (b"!#$%&'*+-/=?^_`{|}~",
                                                 b"!#$%&'*+-/=?^_`{|}~"),
                (b'', b'""'), (b'.a', b'".a"'), (b'a.', b'"a."'),
                (b'a..b', b'"a..b"'), (b'.', b'"."'), (b'a b', b'"a b"'),
                (b'a\tb', b'"a\tb"'), (b'\x01', b'"\x01"'),
                (b'\x7f', b'"\x7f"'), (b'a"b', b'"a\\"b"'),
                (b'a\\b', b'"a\\\\b"'), (b'"a b"', b'"\\"a b\\""'),
                (b'\xc3\xbc', b'\xc3\xbc'), (b'\xff', b'\xff')):
            self.check(want, qr.quote, box)
        for special in b'"(),:;<>@[\\] ':
            quoted = qr.quote(b'a%cb' % special)
            self.assertEqual(b'""', quoted[:1] + quoted[-1:])

    def test_envelope_address(self):
        for address, want in (
                (b'', b''), (b'a@b', b'a@b'), (b'postmaster', b'postmaster'),
                (b'A.b+c@D.Example', b'A.b+c@D.Example'),
                (b'a@b@c', b'"a@b"@c'), (b'@d', b'""@d'), (b'a@', b'a@'),
                (b'a b@c', b'"a b"@c'), (b'a"b@c', b'"a\\"b"@c'),
                (b'<a>@b', b'"<a>"@b'), (b'a@[192.0.2.1]', b'a@[192.0.2.1]'),
                (b'\x01@b', b'"\x01"@b'), (b'x' * 65 + b'@b',
                                           b'x' * 65 + b'@b'),
                (b'a@' + b'x' * 300, b'a@' + b'x' * 300),
                ('ü@ü'.encode(), 'ü@ü'.encode()), (b'\xff@\xff',
                                                   b'\xff@\xff'),
                (b'#@[]', b'#@[]'),
                # never sent
                (b'a\r@b', None), (b'a\n@b', None), (b'a\0@b', None),
                (b'a@b\r', None), (b'a@b\nRCPT', None), (b'a@b\0', None),
                (b'a@b c', None), (b'a@b>', None), (b'a@<b', None),
                (b'a@b\t', None), (b'a@b\x7f', None), (b'a>b', None),
                (b'a b', None), (b'\r\n', None)):
            self.check(want, qr.envelope_address, address)

    def test_an_address_is_one_argument(self):
        """Whatever the bytes: either refused, or outside of quotes nothing
        that could end the argument."""
        for value in range(256):
            for form in (b'%c', b'a%cb', b'a%cb@c', b'a@b%cc', b'%c@%c'):
                address = form.replace(b'%c', bytes([value]))
                sent = qr.envelope_address(address)
                if sent is None:
                    self.assertTrue(value <= 32 or value in b'<>\x7f')
                    continue
                outside = re.sub(br'"(\\[\s\S]|[^"\\])*"', b'', sent)
                self.assertFalse(re.search(br'[\0-\x20\x7f<>]', outside),
                                 (address, sent))
                self.assertFalse(re.search(br'[\0\r\n]', sent))

    def test_a_labels(self):
        strasse = 'stra\N{LATIN SMALL LETTER SHARP S}e'
        for host, want in (
                ('Example.COM', b'Example.COM'), ('', b''), ('.', b'.'),
                (strasse, b'xn--strae-oqa'), ('strasse', b'strasse'),
                ('bücher.example', b'xn--bcher-kva.example'),
                ('BÜCHER.Example', b'xn--bcher-kva.example'),
                ('bu\N{COMBINING DIAERESIS}cher', b'xn--bcher-kva'),
                ('BU\N{COMBINING DIAERESIS}CHER', b'xn--bcher-kva'),
                ('a.ü.b.', b'a.xn--tda.b.'), ('ü..a', b'xn--tda..a')):
            self.check(want, qr.a_labels, host.encode())
        # a full-width dot is no dot, full-width digits are no digits
        self.check(0, lambda host: qr.a_labels(host.encode()).count(b'.'),
                   'ü\N{IDEOGRAPHIC FULL STOP}a')
        self.check(None, lambda host: qr.literal(host.encode()),
                   '\N{FULLWIDTH DIGIT ONE}.2.3.4')
        for host in (b'\xff', b'a.\xc3', b'\xed\xa0\x80', b'\xc0\xae'):
            self.check(None, qr.a_labels, host)

    def test_to_wire(self):
        longest = b'.'.join([b'a' * 63] * 3 + [b'b' * 61])
        for host, want in (
                (b'a', b'\x01a\0'), (b'a.', b'\x01a\0'),
                (b'Mail.Example', b'\x04mail\x07example\0'),
                (b'_x.a-b', b'\x02_x\x03a-b\0'),
                (b'1.2.3.4.', b'\x011\x012\x013\x014\0'),
                ('ü'.encode(), b'\x07xn--tda\0'),
                (b'a' * 63, b'\x3f' + b'a' * 63 + b'\0'),
                (longest, (b'\x3f' + b'a' * 63) * 3 + b'\x3d' + b'b' * 61 +
                 b'\0'),
                (longest + b'.', (b'\x3f' + b'a' * 63) * 3 + b'\x3d' +
                 b'b' * 61 + b'\0'),
                (b'', None), (b'.', None), (b'..', None), (b'a..b', None),
                (b'.a', None), (b'a..', None), (b'a' * 64, None),
                (longest + b'b', None), (b'a.' * 128, None),
                (b'a b', None), (b'a\0', None), (b'a\r', None),
                (b'<a>', None), (b'a\x7f', None), (b'\xff', None),
                (b'[192.0.2.1', None), (b'[300.1.1.1]', None),
                (('ü' * 60).encode(), None),
                ('ü\r'.encode(), None), ('ü '.encode(), None),
                ('.ü'.encode(), None)):
            self.check(want, qr.to_wire, host)

    def test_a_name_without_measure(self):
        """A host of any length is refused soon: Python's Punycode takes
        minutes for 60 KB of letters."""
        text = ''.join(map(chr, range(0x4e00, 0x4e00 + 3000))).encode()
        start = time.process_time()
        self.check(None, qr.to_wire, b'a.' + text + b'.example')
        self.check(None, qr.to_wire, b'a.' * 50000)
        self.assertLess(time.process_time() - start, 0.3)

    def test_canonical(self):
        for text, want in (
                (b'192.0.2.1', b'192.0.2.1'), (b'0.0.0.0', b'0.0.0.0'),
                (b'255.255.255.255', b'255.255.255.255'),
                (b'2001:DB8::1', b'2001:db8::1'), (b'::', b'::'),
                (b'2001:0db8:0000:0000:0:0:0:1', b'2001:db8::1'),
                (b'1:0:0:2:0:0:0:3', b'1:0:0:2::3'),
                (b'::ffff:192.0.2.1', b'192.0.2.1'),
                (b'::ffff:c000:201', b'192.0.2.1'),
                (b'', None), (b'192.0.2', None), (b'192.0.2.1.', None),
                (b'192.0.2.300', None), (b'192.0.2.1.1', None),
                (b'192.0.2.-1', None), (b'192.0.2.0x1', None),
                (b' 192.0.2.1', None), (b'192.0.2.1 ', None),
                (b'192.0.2.1\n', None), (b'192.0.2.1\0', None),
                (b'4294967297.1.1.1', None), (b'3232235777', None),
                (b'fe80::1%lo', None), (b'fe80::1%1', None),
                (b':', None), (b':::', None), (b'1::2::3', None),
                (b'::g', None), (b'1:2:3:4:5:6:7', None),
                (b'1:2:3:4:5:6:7:8:9', None), (b'::12345', None),
                (b'[::1]', None), ('１.2.3.4'.encode(), None),
                (b'a.example', None)):
            self.check(want, qr.canonical, text)

    def test_literal(self):
        for host, want in (
                (b'192.0.2.1', b'192.0.2.1'), (b'[192.0.2.1]', b'192.0.2.1'),
                (b'[2001:DB8::1]', b'2001:db8::1'),
                (b'[IPv6:2001:db8::1]', b'2001:db8::1'),
                (b'[ipv6:::1]', b'::1'), (b'[::1]', b'::1'),
                (b'', None), (b'[]', None), (b'[', None), (b']', None),
                (b'::1', None), (b'[::1', None), (b'::1]', None),
                (b'[300.1.1.1]', None), (b'[1.2.3]', None),
                (b'[4294967297.1.1.1]', None), (b'1.2.3.4.', None),
                (b'[1.2.3.4.]', None), (b'[IPv6:1.2.3.4]', None),
                (b'[IPv6:]', None), (b'[IPv4:1.2.3.4]', None),
                (b'[fe80::1%lo]', None), (b'[[::1]]', None),
                (b'[1.2.3.4]x', None), (b'[a.example]', None),
                (b'a.example', None), (b'[\xff]', None)):
            self.check(want, qr.literal, host)

    def test_address_text(self):
        for packed, want in (
                (b'\xc0\0\2\1', b'192.0.2.1'), (bytes(16), b'::'),
                (bytes(15) + b'\1', b'::1'),
                (bytes(10) + b'\xff\xff\xc0\0\2\1', b'192.0.2.1')):
            self.check(want, qr.address_text, packed)

    def test_non_ascii(self):
        for text, want in ((b'', False), (b'a\x7f', False), (b'\x80', True),
                           ('ü'.encode(), True)):
            self.check(want, qr.non_ascii, text)


# Outcomes

class Outcomes(Tables):

    def test_temporary(self):
        for text, want in ((b'Dx', b'Zx'), (b'Zx', b'Zx'), (b'hx', b'sx'),
                           (b'sx', b'sx'), (b'D', b'Z'), (b'r', b'r')):
            self.check(want, qr.temporary, text)

    def test_printable(self):
        self.check(b'a?b??~!', qr.printable, b'a b\r\x80~!')

    def test_output_of(self):
        for recipients, text, want in (
                ([], b'Kok\n', b'Kok\n\0'),
                ([b'r', b'hno\n'], b'Kok\n', b'r\0hno\n\0Kok\n\0'),
                ([b's\0x'], b'Z\0\0y', b's?x\0Z??y\0')):
            self.check(want, qr.output_of, qr.Result(text, recipients))

    def test_brief(self):
        for recipients, text, want in (
                ([], b'Kok\nmore\n', b'Kok\n\0'),
                ([b'r', b'hno\nwhy\n', b'r'], b'Z\n', b'r\0hno\n\0r\0Z\n\0')):
            self.check(want, lambda: qr.output_of(qr.brief(
                qr.Result(text, recipients, tls_summary=b'TLS\n'))))

    # These stand in a report, or make a line of their own.
    PARTS = ('ACCEPTED', 'AUTH_MISSING', 'AUTH_LACKING', 'TLS_CLEAR',
             'TLS_PASSWORD', 'TLS_TRUST', 'TLS_FILE', 'TLS_GAVE_UP',
             'TLS_IN_THE_CLEAR', 'QUIT', 'END_OF_DATA', 'CANCEL')

    def test_every_sentence(self):
        """Each starts with its letter, ends its line, and holds no NUL."""
        for name, text in vars(qr).items():
            if name.isupper() and isinstance(text, bytes) and \
                    text.endswith(b'\n'):
                with self.subTest(name):
                    self.assertNotIn(b'\0', text)
                    if name not in self.PARTS:
                        self.assertIn(text[:1], b'KZDhs')
        self.assertLessEqual(set(self.PARTS), set(vars(qr)))


# DNS wire

def dns_packet(*records, **changes):
    """An answer to QUESTION with id 0x1234, from the wire forms of its
    records.  Changes: id, flags, questions, answers, authority, additional
    (numbers), question (bytes)."""
    answers = changes.get('answers', len(records) -
                          changes.get('authority', 0) -
                          changes.get('additional', 0))
    return struct.pack(
        '!6H', changes.get('id', 0x1234), changes.get('flags', 0x8180),
        changes.get('questions', 1), answers, changes.get('authority', 0),
        changes.get('additional', 0)
    ) + changes.get('question', QUESTION_A) + b''.join(records)


# The name asked is at 12 in the packet, so C0 0C points to it, and C0 0E
# to "test"; the first record starts at 24.
QUESTION_NAME = b'\x01m\x04test\0'
QUESTION_A = QUESTION_NAME + b'\x00\x01\x00\x01'
QUESTION_MX = QUESTION_NAME + b'\x00\x0f\x00\x01'
QUESTION_AAAA = QUESTION_NAME + b'\x00\x1c\x00\x01'
TTL = b'\x00\x00\x01\x2c'
A_RECORD = b'\xc0\x0c\x00\x01\x00\x01' + TTL + b'\x00\x04\xc0\x00\x02\x01'
FIRST = 12 + len(QUESTION_A)


class DnsWire(Tables):

    def test_build_question(self):
        plain = (b'\x12\x34'                        # id
                 b'\x01\x00'                        # RD alone
                 b'\x00\x01\x00\x00\x00\x00\x00\x00'
                 b'\x01m\x04test\x00\x00\x0f\x00\x01')
        edns = (b'\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x01'
                b'\x01m\x04test\x00\x00\x0f\x00\x01'
                b'\x00\x00\x29'                     # the root's OPT
                b'\x04\xd0'                         # 1232 bytes
                b'\x00\x00\x00\x00\x00\x00')
        self.check(plain, qr.build_question, 0x1234, QUESTION_NAME, 15,
                   False)
        self.check(edns, qr.build_question, 0x1234, QUESTION_NAME, 15, True)

    def answer(self, packet, qtype=1):
        return qr.parse_answer(packet, 0x1234, QUESTION_NAME, qtype)

    def values(self, packet, qtype=1):
        """What an answer says about the name asked; None if it is no answer
        to the question."""
        answer = self.answer(packet, qtype)
        return None if answer is None else \
            qr.follow(answer.records, QUESTION_NAME, qtype)[0]

    def test_good_answers(self):
        mx, a = b'\xc0\x0c\x00\x0f\x00\x01' + TTL, [b'192.0.2.1']
        aaaa = b'\xc0\x0c\x00\x1c\x00\x01' + TTL + b'\x00\x10'
        for packet, want in (
                (dns_packet(A_RECORD), a), (dns_packet(), []),
                (dns_packet(A_RECORD, A_RECORD[:-1] + b'\2'),
                 [b'192.0.2.1', b'192.0.2.2']),
                # the owner, and the question, spelled out, in capitals
                (dns_packet(b'\x01M\x04TEST\0' + A_RECORD[2:]), a),
                (dns_packet(A_RECORD, question=b'\x01M\x04tEsT\0\0\1\0\1'), a),
                # half a pointer: m, then "test"; a pointer to a pointer
                (dns_packet(b'\x01m\xc0\x0e' + A_RECORD[2:]), a),
                (dns_packet(A_RECORD, b'\xc0\x18' + A_RECORD[2:]), a * 2),
                # any TTL; bytes after the last record; an unknown type
                (dns_packet(A_RECORD[:6] + bytes(4) + A_RECORD[10:]), a),
                (dns_packet(A_RECORD[:6] + b'\xff' * 4 + A_RECORD[10:]), a),
                (dns_packet(A_RECORD) + b'garbage', a),
                (dns_packet(b'\xc0\x0c\xff\x00\x00\x01' + TTL + b'\x00\x02??',
                            A_RECORD), a)):
            self.check(want, self.values, packet)
        for rdata, want in (
                (b'\x20\x01\x0d\xb8' + bytes(11) + b'\1', [b'2001:db8::1']),
                (bytes(10) + b'\xff\xff\xc0\0\2\1', a)):
            self.check(want, self.values, dns_packet(
                aaaa + rdata, question=QUESTION_AAAA), 28)
        for rdata, want in (
                (b'\x00\x08\x00\x0a\x03MX1\xc0\x0e',
                 (10, b'\x03mx1\x04test\0')),
                (b'\x00\x03\x00\x00\x00', (0, b'\0')),
                (b'\x00\x04\xff\xff\xc0\x0c', (65535, QUESTION_NAME))):
            self.check([want], self.values, dns_packet(
                mx + rdata, question=QUESTION_MX), 15)

    def test_no_answer_to_this_question(self):
        """Not counted: whoever sent it, the right one may still come."""
        for packet in (
                b'', b'\x12', dns_packet(A_RECORD)[:11],
                dns_packet(A_RECORD)[:12], dns_packet()[:-1],
                struct.pack('!6H', 0x1234, 0x8180, 0, 0, 0, 0),
                # a header alone: SERVFAIL; FORMERR, wrong id; QR clear
                dns_packet(flags=0x8182)[:12],
                dns_packet(flags=0x8181, id=0x1235)[:12],
                dns_packet(flags=0x0181)[:12],
                dns_packet(flags=0x8181, question=QUESTION_MX),
                # wrong id; QR clear; other opcodes
                dns_packet(A_RECORD, id=0x1235),
                dns_packet(A_RECORD, flags=0x0180),
                dns_packet(A_RECORD, flags=0x8980),
                dns_packet(A_RECORD, flags=0xc180),
                # no question, two; another name, type, class; a pointer
                dns_packet(A_RECORD, questions=0, question=b''),
                dns_packet(A_RECORD, questions=2, question=QUESTION_A * 2)):
            self.check(None, self.values, packet)
        for question in (b'\x01n\x04test\0\0\1\0\1', QUESTION_MX,
                         b'\x01m\x04test\1x\0\0\1\0\1', b'\xc0\x0c\0\1\0\1',
                         QUESTION_NAME + b'\0\1\0\3'):
            self.check(None, self.values,
                       dns_packet(A_RECORD, question=question))

    def test_header_alone(self):
        """Servers from before EDNS answer so to what they do not know."""
        for flags in 0x8181, 0x8184, 0x8101, 0x8581:
            whole = dns_packet(flags=flags)
            for packet in (whole[:12], dns_packet(
                    flags=flags, questions=0, question=b'')):
                answer = self.answer(packet)
                self.assertEqual((flags & 15, False, []), (
                    answer.rcode, answer.truncated, answer.records))

    def test_short_tlsa_records(self):
        """They stay, for their zone has TLSA records, but cannot be used;
        the others are as good as without them."""
        name = b'\x03_25\x04_tcp\x01m\x04test\0'

        def record(data):
            return b'\xc0\x0c\0\x34\0\1' + TTL + struct.pack(
                '!H', len(data)) + data
        good = b'\3\1\1' + bytes(32)
        for short in b'', b'\3', b'\3\1', b'\3\1\1', b'\3\1\0', b'\2\0\0':
            with self.subTest(repr(short)):
                answer = qr.parse_answer(dns_packet(
                    record(short), record(good),
                    question=name + b'\0\x34\0\1'), 0x1234, name, qr.TLSA)
                values = qr.follow(answer.records, name, qr.TLSA)[0]
                self.assertEqual([False, True], [
                    qr.dane_usable(value) for value in values])
                self.assertEqual((3, 1, 1, bytes(32)), values[1])

    def test_malformed(self):
        """It answers, but breaks RFC 1035: the next server."""
        def owned_by(name):
            return dns_packet(name + A_RECORD[2:])
        name_of_256 = (b'\x3f' + b'a' * 63) * 3 + b'\x3e' + b'b' * 62 + b'\0'
        whole = dns_packet(A_RECORD)
        bad = [owned_by(name) for name in (
            # pointers: to themselves, in a loop of two, forward, past the
            # end, into the header, to its last byte
            b'\xc0\x18', b'\x01a\xc0\x18', b'\xc0\x1a', b'\xff\xff',
            b'\xc0\x00', b'\xc0\x0b',
            # label types 0x40 and 0x80; 256 bytes, with a pointer, too
            b'\x41' + b'a' * 65 + b'\0', b'\x81' + b'a' * 129 + b'\0',
            name_of_256, (b'\x3f' + b'a' * 63) * 3 + b'\x39' + b'a' * 57 +
            b'\xc0\x0e')]
        bad += [dns_packet(start, answers=1)        # ends too soon
                for start in (b'\xc0', b'\x01a', b'\x05a')]
        bad += [whole[:-5], whole[:-1], dns_packet(A_RECORD, answers=2),
                dns_packet(A_RECORD, answers=65535),
                dns_packet(A_RECORD, answers=1, authority=1),
                dns_packet(A_RECORD, answers=1, additional=1)]
        bad += [dns_packet(b'\xc0\x0c' + struct.pack(
            '!HHIH', rtype, 1, 300, len(rdata)) + rdata + more)
                for rtype, rdata, more in (
                    (1, b'abc', b''), (1, b'abcde', b''), (1, b'', b''),
                    (28, bytes(17), b''), (28, bytes(4), b''),
                    (15, b'\0\1', b''), (15, b'', b''),
                    # bytes after the name; a name that leaves the rdata
                    (15, b'\0\1\xc0\x0c?', b''), (15, b'\0\1\x05', b'a' * 9),
                    (5, b'', b''), (5, b'\xc0\x0c\0', b''),
                    (5, b'\xc0\x30', b''))]
        for packet in bad:
            self.check(qr.Malformed, self.values, packet)
        self.check([], self.values, owned_by(name_of_256[64:]))

    def test_records_that_do_not_count(self):
        other = b'\x01n\xc0\x0e'
        for records in (
                # of another, the parent, a child, the root
                [other + A_RECORD[2:]], [b'\xc0\x0e' + A_RECORD[2:]],
                [b'\x01x\xc0\x0c' + A_RECORD[2:]], [b'\0' + A_RECORD[2:]],
                # another type; class CHAOS, ANY, 0
                [A_RECORD[:2] + b'\0\x10' + A_RECORD[4:]],
                [A_RECORD[:4] + b'\0\3' + A_RECORD[6:]],
                [A_RECORD[:4] + b'\0\xff' + A_RECORD[6:]],
                [A_RECORD[:4] + b'\0\0' + A_RECORD[6:]],
                # CNAMEs: of class CHAOS, of another name
                [b'\xc0\x0c\0\5\0\3' + TTL + b'\0\4\x01n\xc0\x0e',
                 other + A_RECORD[2:]],
                [other + b'\0\5\0\1' + TTL + b'\0\4\x01o\xc0\x0e',
                 b'\x01o\xc0\x0e' + A_RECORD[2:]]):
            self.check([], self.values, dns_packet(*records))
        self.check([], self.values, dns_packet(
            A_RECORD, A_RECORD, authority=1, additional=1))

    def test_header_and_sections(self):
        soa = (b'\xc0\x0e\x00\x06\x00\x01' + TTL + b'\x00\x18\x00\x00' +
               bytes(20) + b'\0\1')

        def opt(ttl):
            return b'\0\0\x29\x04\xd0' + struct.pack('!IH', ttl, 0)
        # rcode, truncated, lame, has_soa
        for want, packet in (
                ((0, 0, 0, 0), dns_packet(flags=0x8180)),       # RA
                ((0, 0, 0, 0), dns_packet(flags=0x8500)),       # AA
                ((0, 0, 1, 0), dns_packet(flags=0x8100)),
                ((2, 0, 0, 0), dns_packet(flags=0x8182)),
                ((15, 0, 0, 0), dns_packet(flags=0x818f)),
                ((0, 1, 0, 0), dns_packet(flags=0x8380)),
                ((0, 0, 0, 1), dns_packet(soa, authority=1)),
                ((0, 0, 0, 0), dns_packet(soa, additional=1)),
                ((0, 0, 0, 0), dns_packet(opt(0), additional=1)),
                ((0, 0, 0, 0), dns_packet(opt(0x8000), additional=1)),
                ((16, 0, 0, 0), dns_packet(opt(1 << 24), additional=1)),
                ((18, 0, 0, 0), dns_packet(opt(1 << 24), additional=1,
                                           flags=0x8182))):
            self.check(want, lambda: (lambda answer: (
                answer.rcode, answer.truncated, answer.lame,
                answer.has_soa))(self.answer(packet)))

    def test_truncated(self):
        """What a truncated answer holds is not looked at."""
        whole = dns_packet(A_RECORD, A_RECORD, flags=0x8380)
        for end in (len(whole), len(whole) - 3, FIRST + len(A_RECORD),
                    FIRST + 3, FIRST):
            answer = self.answer(whole[:end])
            self.assertTrue(answer.truncated)
            self.assertEqual([], answer.records)

    def test_follow(self):
        def chain(links, *more):
            return [(b'%d' % i, qr.CNAME, b'%d' % (i + 1))
                    for i in range(links)] + list(more)

        def at(name, value=b'a'):
            return name, qr.A, value
        ten = chain(10, at(b'10'))
        for records, want in (
                ([], ([], b'0', 0)), ([at(b'0')], ([b'a'], b'0', 0)),
                ([at(b'0', b'b'), at(b'0')], ([b'b', b'a'], b'0', 0)),
                (chain(1, at(b'1')), ([b'a'], b'1', 1)),
                (chain(1, at(b'1'))[::-1], ([b'a'], b'1', 1)),
                # ten links in any order; eleven; loops
                (ten, ([b'a'], b'10', 10)), (ten[::-1], ([b'a'], b'10', 10)),
                (ten[::2] + ten[1::2], ([b'a'], b'10', 10)),
                (chain(11, at(b'11')), qr.Malformed),
                ([(b'0', qr.CNAME, b'0')], qr.Malformed),
                ([(b'0', qr.CNAME, b'1'), (b'1', qr.CNAME, b'0')],
                 qr.Malformed),
                # the end, and a loop, elsewhere
                (chain(2, at(b'5')), ([], b'2', 2)),
                ([(b'7', qr.CNAME, b'7'), at(b'0')], ([b'a'], b'0', 0))):
            self.check(want, qr.follow, records, b'0', qr.A)

    def test_names(self):
        """Pointers lead back, each farther than the one before it; labels
        have up to 63 bytes, names 255."""
        # At 12 the root's name, then pointers, each to the one before it.
        chain = bytes(13) + b''.join(
            struct.pack('!H', 0xC000 | max(12, 2 * i + 11))
            for i in range(300))
        again = bytes(12) + b'\xc0\x0e\x01a\0\xc0\x0c'
        most = (b'\x3f' + b'a' * 63) * 3 + b'\x3d' + b'b' * 61 + b'\0'
        for title, packet, at, want in (
                ('300 pointers', chain, 13 + 2 * 299, (b'\0', 15 + 2 * 299)),
                ('back, then forward', again, 17, qr.Malformed),
                ('to the place itself', again, 14, (b'\1a\0', 17)),
                ('a label of 63', b'\x3f' + b'a' * 63 + b'\0', 0,
                 (b'\x3f' + b'a' * 63 + b'\0', 65)),
                ('a label of 64', b'\x40' + b'a' * 64 + b'\0', 0,
                 qr.Malformed),
                ('255 bytes', most, 0, (most, 255))):
            with self.subTest(title):
                self.check(want, qr.Names(packet).read, at)

    def test_names_are_read_once(self):
        """However often they are wanted, and not without end."""
        label, many = b'\x01a', 120
        packet = bytes(12) + label * many + b'\0' + b'\xc0\x0c' * 5000 + \
            bytes(9999)
        names = qr.Names(packet)
        for i in range(5000):
            self.assertEqual(label * many + b'\0',
                             names.read(13 + 2 * (many + i))[0])
        self.assertEqual(len(packet) - many - 1 - 5000, names.steps)
        for i in range(many):           # each from another place on
            names.read(12 + 2 * i)
        packet = bytes(12) + (label * many + b'\0') * 9
        names = qr.Names(packet)
        with self.assertRaises(qr.Malformed):
            for i in range(9 * many):
                names.read(12 + 2 * (i % many) + 241 * (i // many))
        self.assertGreater(i, 15)


# DNS lookups

class NameServers(Tables):

    def servers(self, data, override=b''):
        return [server.sockaddr[:2] for server in
                qr.parse_resolv_conf(data, override).servers]

    def test_name_server(self):
        try:
            index = socket.if_nametoindex('lo')
        except OSError:                     # a system without lo
            index = None
        v4, v6 = socket.AF_INET, socket.AF_INET6
        for text, want in (
                (b'192.0.2.1', (v4, (b'192.0.2.1', 53))),
                (b'192.0.2.1:5353', (v4, (b'192.0.2.1', 5353))),
                (b'192.0.2.1:65535', (v4, (b'192.0.2.1', 65535))),
                (b'::1', (v6, (b'::1', 53, 0, 0))),
                (b'2001:db8::1', (v6, (b'2001:db8::1', 53, 0, 0))),
                (b'[::1]:5353', (v6, (b'::1', 5353, 0, 0))),
                (b'fe80::1%7', (v6, (b'fe80::1', 53, 0, 7))),
                (b'[fe80::1%7]:53', (v6, (b'fe80::1', 53, 0, 7))),
                (b'fe80::1%lo', index and (v6, (b'fe80::1', 53, 0, index))),
                (b'fe80::1%nosuch', None), (b'fe80::1%', None),
                (b'fe80::1%4294967296', None),
                (b'fe80::1%' + b'9' * 5000, None),
                (b'', None), (b'localhost', None), (b'192.0.2', None),
                (b'192.0.2.1:0', None), (b'192.0.2.1:65536', None),
                (b'192.0.2.1:', None), (b'192.0.2.1:x', None),
                (b'192.0.2.1:-1', None), (b'192.0.2.1:00005399999', None),
                (b'192.0.2.1:000001' + b'0' * 5000, None),
                (b'[::1]:0', None), (b'[::1', None), (b'[::1]x', None),
                (b'[', None), (b']', None), (b'\xff', None), (b'\0', None)):
            self.check(
                want, lambda text: (lambda server: server and (
                    server.family, server.sockaddr))(qr.name_server(text)),
                text)

    def test_resolv_conf(self):
        default = [(b'127.0.0.1', 53)]
        one = [(b'192.0.2.1', 53)]
        ten = b''.join(b'nameserver 192.0.2.%d\n' % i for i in range(1, 11))
        for title, data, want in (
                ('missing', None, default), ('empty', b'', default),
                ('binary', bytes(range(256)) * 99, default),
                ('ordinary', b'search x\nnameserver 192.0.2.1\n', one),
                ('no final newline', b'nameserver 192.0.2.1', one),
                ('tab', b'nameserver\t192.0.2.1\n', one),
                ('CRLF', b'nameserver 192.0.2.1\r\n', one),
                ('comments', b'# nameserver 192.0.2.9\n; nameserver 9.9.9.9'
                 b'\n#nameserver 9.9.9.9\nnameserver 192.0.2.1 # x\n', one),
                ('nonsense among others', b'nameserver\nnameserver x\n'
                 b'nameserver 192.0.2.1\nnameservers 9.9.9.9\n', one),
                ('IPv6', b'nameserver ::1\n', [(b'::1', 53)]),
                ('scoped IPv6', b'nameserver fe80::1%1\n',
                 [(b'fe80::1', 53)]),
                ('ten servers', ten, [(b'192.0.2.%d' % i, 53)
                                      for i in (1, 2, 3)]),
                ('the third good one', b'nameserver x\n' * 3 + ten,
                 [(b'192.0.2.%d' % i, 53) for i in (1, 2, 3)])):
            with self.subTest(title):
                self.check(want, self.servers, data)

    def test_dnscacheip(self):
        conf = b'nameserver 192.0.2.1\n'
        for override, want in (
                (b'', [(b'192.0.2.1', 53)]), (b' ', [(b'192.0.2.1', 53)]),
                (b'127.0.0.1', [(b'127.0.0.1', 53)]),
                (b'127.0.0.1 ::1\t127.0.0.1:5353 [::1]:5353',
                 [(b'127.0.0.1', 53), (b'::1', 53), (b'127.0.0.1', 5353)]),
                (b'[::1]:5353', [(b'::1', 5353)]),
                (b'x 127.0.0.1', [(b'127.0.0.1', 53)]),
                (b'nonsense', [(b'192.0.2.1', 53)])):
            self.check(want, self.servers, conf, override)

    def test_options(self):
        def options(line):
            config = qr.parse_resolv_conf(line)
            return config.timeout, config.attempts, config.tcp
        for line, want in (
                (b'', (5, 2, False)), (b'options', (5, 2, False)),
                (b'options ndots:5 rotate', (5, 2, False)),
                (b'options timeout:3 attempts:4', (3, 4, False)),
                (b'options timeout:3\noptions attempts:4\r\n',
                 (3, 4, False)),
                (b'options use-vc trust-ad', (5, 2, True)),
                (b'options use-vcx', (5, 2, False)),
                (b'options timeout:99 attempts:99', (30, 5, False)),
                (b'options timeout:0 attempts:0', (1, 1, False)),
                (b'options timeout: attempts:x', (5, 2, False)),
                (b'options timeout:-1', (5, 2, False)),
                (b'options timeout:' + b'9' * 5000, (30, 2, False)),
                (b'#options timeout:3', (5, 2, False))):
            self.check(want, options, line)

    def test_trust(self):
        """AD in an answer counts from this host alone, or with trust-ad;
        one server that is not trusted is enough for none to be."""
        here, away = b'nameserver 127.0.0.53\n', b'nameserver 192.0.2.1\n'
        docker = b'nameserver 127.0.0.11\n'
        option = b'options trust-ad\n'
        for data, override, want in (
                (here, b'', True), (away, b'', False),
                (b'nameserver ::1\n', b'', True),
                (b'nameserver 2001:db8::1\n', b'', False),
                (here + away, b'', False),
                (away + here, b'', False),
                (option + away, b'', True),
                (away + here + option, b'', True),
                (option + away, b'192.0.2.2', False),
                (away + b'options edns0 trust-ad', b'', True),
                (b'', b'127.0.0.1:5353 [2001:db8::1]:53', False),
                (away, b'127.0.0.1 [::1]:53', True),
                (here, b'127.0.0.1 192.0.2.2', False),
                (here * 3 + away, b'', True), (b'', b'', True),
                # Docker's resolver, and whatever else merely forwards
                (docker, b'', False), (docker + option, b'', True),
                (here + docker, b'', False),
                (b'nameserver 127.0.0.54\n', b'', False),
                (b'nameserver 127.1.1.1\n', b'', False),
                (b'', b'127.0.0.11', False),
                (b'nameserver ::ffff:127.0.0.11\n', b'', False),
                (b'nameserver ::ffff:127.0.0.1\n', b'', True)):
            self.check(want, lambda: qr.parse_resolv_conf(
                data, override).trusted)


class SideBySide(Tables):
    """run_concurrently() with sockets that are ready at a moment of virtual
    time: a "socket" here is that moment."""

    def setUp(self):
        self.clock, self.most, self.waiting = VirtualClock(0), 0, 0

    def wait(self, reading, writing, deadline):
        if self.clock.now >= deadline:
            raise qr.TimedOut()
        moment = min(reading + writing, default=deadline)
        if moment >= deadline:
            self.clock.now = deadline
            raise qr.TimedOut()
        self.clock.now = max(self.clock.now, moment)
        return ([place for place in reading if place <= moment],
                [place for place in writing if place <= moment])

    def job(self, name, *places):
        """A generator that waits for each place, and tells how it went."""
        story = []
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        for place in places:
            try:
                yield place
                story.append('ready')
            except qr.TimedOut:
                story.append('timed out')
        self.waiting -= 1
        return name, story, self.clock.now

    def run_jobs(self, *jobs):
        return qr.run_concurrently(list(jobs), self.wait, self.clock)

    def test_results(self):
        for title, jobs, want, end in (
                ('none', [], [], 0),
                ('one that never waits', [self.job('a')], [('a', [], 0)], 0),
                ('the time of the slowest, in their order',
                 [self.job('a', (7, False, 99)), self.job('b', (5, 0, 99)),
                  self.job('c', (3, True, 99))],
                 [('a', ['ready'], 7), ('b', ['ready'], 5),
                  ('c', ['ready'], 3)], 7),
                ('each has its deadline',
                 [self.job('a', (99, False, 20)), self.job('b', (99, 0, 10)),
                  self.job('c', (15, True, 20))],
                 [('a', ['timed out'], 20), ('b', ['timed out'], 10),
                  ('c', ['ready'], 15)], 20),
                ('several waits',
                 [self.job('a', (1, 0, 9), (99, 0, 5), (6, 1, 9)),
                  self.job('b', (2, 0, 9))],
                 [('a', ['ready', 'timed out', 'ready'], 6),
                  ('b', ['ready'], 2)], 6),
                ('no socket, a pause',
                 [self.job('a', (None, False, 4)), self.job('b', (9, 0, 9))],
                 [('a', ['timed out'], 4), ('b', ['timed out'], 9)], 9)):
            with self.subTest(title):
                self.clock.now = 0
                self.check(want, self.run_jobs, *jobs)
                self.assertEqual(end, self.clock.now)

    def test_not_too_many_at_once(self):
        jobs = [self.job(i, (1000 + i, False, 9999)) for i in range(700)]
        results = self.run_jobs(*jobs)
        self.assertEqual(list(range(700)), [name for name, _, _ in results])
        self.assertLessEqual(self.most, qr.DNS_TOGETHER)
        self.assertEqual(1699, self.clock.now)

    def test_enough(self):
        """Not before two seconds, and then as soon as it is; who is left is
        closed."""
        def job(place, closed):
            try:
                yield place, False, 99
                return place
            finally:
                closed.append(place)
        asked = []

        def first_two(results):
            asked.append(self.clock.now)
            return None not in results[:2]
        for places, want, end in (
                ((.1, .5, 50), [.1, .5, None], 2),
                ((1, 2, 50), [1, 2, None], 2),
                ((1, 5, 50), [1, 5, None], 5),
                ((1, 5, 3), [1, 5, 3], 5),
                ((.1, .5, 1), [.1, .5, 1], 1),
                ((50, 1, 1), [50, 1, 1], 50)):
            with self.subTest(places):
                self.clock.now, closed, asked[:] = 0, [], []
                self.check(want, qr.run_concurrently, [
                    job(place, closed) for place in places], self.wait,
                    self.clock, first_two)
                self.assertEqual((end, sorted(places)),
                                 (self.clock.now, sorted(closed)))
                self.assertGreaterEqual(min(asked, default=2), 2)

    def test_errors_pass(self):
        def broken():
            yield 1, False, 9
            raise qr.Malformed('x')
        self.check(qr.Malformed, self.run_jobs, broken())


# What a scripted name server does to m.test: a dictionary (see FakeDNS), or a
# function of the FakeDNS, the query, its DnsQuestion, and udp or tcp.

def over_tcp(*replies):
    """These over TCP, TC over UDP."""
    return lambda server, query, question, via: list(replies) \
        if via == 'tcp' else [dns_message(question, flags=0x8380)]


def plain_only(rcode=None, header=None):
    """An answer without EDNS only: to a question with it an rcode, a bare
    header, or nothing."""
    def reply(server, query, question, via):
        if not question.edns:
            return [server.ordinary(question, via)]
        return [query[:2] + header] if header else \
            [server.ordinary(question, rcode=rcode)] if rcode else []
    return reply


def noise(server, query, question, via):
    """The answer after what is none to this question."""
    right = server.ordinary(question)
    wrong = [dns_record('m.test', 'A', '192.0.2.66')]
    return [b'', right[:12], right[:-20][:11],
            dns_message(question, wrong, id_=question.id ^ 1),
            dns_message(question, wrong, flags=0x0180),
            dns_message(question._replace(name='n.test'), wrong),
            dns_message(question._replace(type='MX'), wrong), right]


def partial(server, query, question, via):
    """Another address over UDP, cut short."""
    return [server.ordinary(question) if via == 'tcp' else dns_message(
        question, [dns_record('m.test', 'A', '192.0.2.66')], flags=0x8380)]


def no_recursion(server, query, question, via):
    """Neither AA nor RA in the answer."""
    reply = bytearray(server.ordinary(question))
    reply[2:4] = bytes((0x81, reply[3] & 15))
    return [bytes(reply)]


def drip(server, query, question, via):
    """A byte every 20 ms."""
    def drops():
        yield Unframed(b'\x7f\xff')
        for _ in range(100):
            time.sleep(0.02)
            yield Unframed(b'x')
    return drops() if via == 'tcp' else [dns_message(question, flags=0x8380)]


def dns_says(*answers, **changes):
    """These records alone; changes as for dns_message."""
    return lambda server, query, question, via: [dns_message(
        question, [dns_record(*answer) for answer in answers], **changes)]


# No answer: the next server is asked; if there is none, soft.
DNS_FAULTS = {
    'FORMERR': {'rcode': 1}, 'SERVFAIL': {'rcode': 2}, 'NOTIMP': {'rcode': 4},
    'REFUSED': {'rcode': 5}, 'rcode 15': {'rcode': 15},
    'nothing': {'silent': True},
    'a referral': dns_says(flags=0x8100, authority=[
        dns_record('test', 'NS', 'ns.test')]),
    'no records, neither AA nor RA': dns_says(flags=0x8100),
    'no such name, neither AA nor RA': dns_says(flags=0x8103),
    'a foreign record, neither AA nor RA': dns_says(
        ('n.test', 'A', '192.0.2.66'), flags=0x8100),
    'a CNAME alone, neither AA nor RA': dns_says(
        ('m.test', 'CNAME', 'n.test'), flags=0x8100,
        authority=[dns_record('test', 'SOA', bytes(22))]),
    'cut': lambda server, query, question, via: [
        server.ordinary(question)[:-13]],
    'a header with FORMERR to everything': lambda server, query, *_: [
        query[:2] + b'\x81\x81' + bytes(8)],
    'TCP: closed': over_tcp(None),
    'TCP: closed in the length': over_tcp(Unframed(b'\0'), None),
    'TCP: closed after it': over_tcp(Unframed(b'\0\x20'), None),
    'TCP: closed half-way': over_tcp(Unframed(b'\0\x20' + bytes(9)), None),
    'TCP: length 0': over_tcp(b''), 'TCP: garbage': over_tcp(bytes(99)),
    'TCP: wrong id': lambda server, query, question, via: [dns_message(
        question, flags=0x8380 if via == 'udp' else 0x8180,
        id_=question.id ^ (via == 'tcp'))],
    'TCP: refused': {'truncate': True}, 'TCP: drips': drip,
    'TCP: truncated, too': dns_says(flags=0x8380)}

TCP_ONLY = b'options use-vc'

# What the server does, how it is asked; the questions that it sees, each with
# EDNS (+) or without.
DNS_ANSWERS = [
    ({}, b'', ['udp+']), ({}, TCP_ONLY, ['tcp+']), (noise, b'', ['udp+']),
    ({'truncate': True}, b'', ['udp+', 'tcp+']),
    (partial, b'', ['udp+', 'tcp+']), (no_recursion, b'', ['udp+']),
    (plain_only(1), b'', ['udp+', 'udp']),
    (plain_only(4), b'', ['udp+', 'udp']),
    (plain_only(), b'options attempts:2', ['udp+', 'udp'])] + [
        (plain_only(header=b'\x81' + rcode + questions + bytes(6)), *asked)
        for rcode in (b'\x81', b'\x84') for questions in (b'\0\0', b'\0\1')
        for asked in ((b'', ['udp+', 'udp']), (TCP_ONLY, ['tcp+', 'tcp']))]


class Resolving(Tables):
    """The Resolver against scripted name servers on loopback."""

    NAME = dns_name('m.test')
    GOOD = 'ok', [b'192.0.2.1']

    def resolver(self, *servers, timeout=10.0, options=b'', **others):
        config = qr.parse_resolv_conf(options, b' '.join(
            getattr(server, 'dns', server).encode() for server in servers))
        config.timeout = timeout
        if b'attempts' not in options:
            config.attempts = 1
        return qr.Resolver(config, qr.wait, time.monotonic, **others)

    def ask(self, resolver, name=NAME, qtype=1):
        lookup, = resolver.ask([(name, qtype)])
        return lookup.status, lookup.values

    @contextlib.contextmanager
    def server(self, what=None, **options):
        """A FakeDNS that does this, and lists how it is asked."""
        def called(query, question, via):
            server.asked.append(via + '+' * question.edns)
            if callable(what):
                return what(server, query, question, via)
            return [server.ordinary(question, via, **what or {})]
        delayed = {'delay', 'silent'}.intersection(what or ()) \
            if not callable(what) else False
        with FakeDNS({('m.test', 'A'): ['192.0.2.1']}, {
                ('m.test', '*'): what if delayed else called},
                     **options) as server:
            server.asked = []
            yield server

    def test_answers(self):
        """CNAME chains of ten, whole or a link at a time."""
        def piece(query, question, via):
            links = server.records.get((question.name.lower(), 'CNAME'))
            return [dns_message(question, [dns_record(
                question.name, 'CNAME', links[0])]) if links else
                    server.ordinary(question)]

        def endless(query, question, via):
            count = len(server.queries)
            return [dns_message(question, [dns_record(
                question.name, 'CNAME', 'x%d.test' % count)])]
        names = [['%s%d.test' % (kind, i) for i in range(12)] for kind in 'lp']
        records = {(name, 'CNAME'): [target] for chain in names
                   for name, target in zip(chain, chain[1:])}
        records.update({
            ('m.test', 'A'): ['192.0.2.1'], ('l11.test', 'A'): ['192.0.2.1'],
            ('p11.test', 'A'): ['192.0.2.1'],
            ('m.test', 'MX'): [(10, 'mx.test')], ('null.test', 'MX'): [
                (0, '.')], ('v6.test', 'AAAA'): ['2001:db8::1'],
            ('alias.test', 'CNAME'): ['m.test'],
            ('loop.test', 'CNAME'): ['loop.test'],
            ('dangling.test', 'CNAME'): ['nowhere.test']})
        pieces = {(name, '*'): piece for name in names[1]}
        pieces.update({('x%d.test' % i, '*'): endless for i in range(50)})
        with FakeDNS(records, pieces) as server:
            resolver = self.resolver(server)
            for name, kind, want in (
                    ('m', 'A', self.GOOD), ('m', 'AAAA', ('ok', [])),
                    ('m', 'MX', ('ok', [(10, dns_name('mx.test'))])),
                    ('v6', 'AAAA', ('ok', [b'2001:db8::1'])),
                    ('null', 'MX', ('ok', [(0, b'\0')])),
                    ('nowhere', 'A', ('no name', [])),
                    ('alias', 'A', self.GOOD),
                    ('alias', 'AAAA', ('ok', [])),
                    ('dangling', 'A', ('no name', [])), ('l1', 'A', self.GOOD),
                    ('l0', 'A', ('temporary', [])), ('p1', 'A', self.GOOD),
                    ('p0', 'A', ('temporary', [])),
                    ('loop', 'A', ('temporary', []))):
                self.check(want, self.ask, resolver,
                           dns_name(name + '.test'), DNS_TYPES[kind])
            server.queries.clear()
            self.check(('temporary', []), self.ask, resolver,
                       dns_name('x0.test'))
            self.assertLess(len(server.queries), 15)
            self.assertIsNone(server.error)

    def test_faults(self):
        for title, what in DNS_FAULTS.items():
            slow = title in ('nothing', 'TCP: drips')
            with self.subTest(title), self.server() as good, self.server(
                    what, tcp=title != 'TCP: refused') as bad:
                start, timeout = time.monotonic(), 0.2 if slow else 3
                self.check(self.GOOD, self.ask, self.resolver(
                    bad, good, timeout=timeout))
                self.assertTrue(bad.queries)
                self.check(('temporary', []), self.ask, self.resolver(
                    bad, timeout=timeout))
                self.assertLess(time.monotonic() - start, 2)

    def test_one_server(self):
        for what, options, asked in DNS_ANSWERS:
            with self.subTest(what, options=options), \
                    self.server(what) as server:
                start = time.monotonic()
                self.check(self.GOOD, self.ask, self.resolver(
                    server, options=options, timeout=0.5 if b'attempts' in
                    options else 3))
                self.assertEqual(asked, server.asked)
                self.assertLess(time.monotonic() - start, 2)
        with self.server(no_recursion) as server:
            self.check(('temporary', []), self.ask, self.resolver(server),
                       self.NAME, 28)
        with self.server({'silent': True}) as server:
            self.check(('temporary', []), self.ask, self.resolver(
                server, timeout=0.1, options=b'options attempts:2'))
            self.assertEqual(2, len(server.queries))
        for options in (b'', TCP_ONLY) if HAS_IPV6 else ():
            with self.server(host='::1') as server:
                self.check(self.GOOD, self.ask, self.resolver(
                    server, options=options))

    def test_several_servers(self):
        """NXDOMAIN is an answer.  An ICMP refusal is one from the host, not
        a reason to wait."""
        with FakeDNS() as ignorant, self.server() as good:
            self.check(('no name', []), self.ask,
                       self.resolver(ignorant, good))
            self.assertEqual([], good.queries)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as port:
                port.bind(('127.0.0.1', 0))
                closed = '127.0.0.1:%d' % port.getsockname()[1]
            start = time.monotonic()
            self.check(self.GOOD, self.ask, self.resolver(closed, good))
            self.check(('temporary', []), self.ask, self.resolver(
                closed, closed, options=b'options attempts:2'))
            self.assertLess(time.monotonic() - start, 5)

    def test_late(self):
        """What is still out when there is enough, and nothing stays open."""
        with FakeDNS({('m.test', 'A'): ['192.0.2.1']}, {
                ('x.test', '*'): {'silent': True}}) as server:
            resolver, start = self.resolver(server), time.monotonic()
            lookups = resolver.ask(
                [(self.NAME, 1), (dns_name('x.test'), 1)],
                lambda answers: answers[0] is not None)
            self.assertEqual(
                [('ok', False), ('late', True)],
                [(lookup.status, lookup.unknown()) for lookup in lookups])
            self.assertEqual(0, resolver.open)
            self.assertLess(1.9, time.monotonic() - start)
            self.assertLess(time.monotonic() - start, 8)

    def test_where_to_begin(self):
        """With the server that answered, or that another Resolver has found,
        if it still is one of them."""
        with self.server({'rcode': 2}) as bad, self.server() as good:
            resolver = self.resolver(bad, good)
            for _ in range(3):
                self.check(self.GOOD, self.ask, resolver)
            self.assertEqual((1, 3), (len(bad.queries), len(good.queries)))
            for servers, want in (([bad, good], 1), ([good, bad], 0),
                                  ([bad], 0)):
                bad.queries.clear()
                later = self.resolver(*servers, first=resolver.preferred())
                self.assertEqual(later.config.servers[want],
                                 later.preferred())
                self.ask(later)
                self.assertEqual(servers == [bad], bool(bad.queries))

    def test_many_questions(self):
        """20, each answered 100 ms late, take about 100 ms; 40 wait for each
        other's sockets if there are few.  Their ids cannot be guessed."""
        names = ['m%d.test' % i for i in range(40)]
        ids, want = set(), [[b'192.0.2.%d' % i] for i in range(40)]

        def note(query, question, via):
            ids.add(question.id)
            return [server.ordinary(question)]
        with FakeDNS({(name, 'A'): ['192.0.2.%d' % i]
                      for i, name in enumerate(names)}, {
                          (name, '*'): {'delay': .1} if i < 20 else note
                          for i, name in enumerate(names)}) as server:
            questions = [(dns_name(name), 1) for name in names]
            start = time.monotonic()
            lookups = self.resolver(server).ask(questions[:20])
            took = time.monotonic() - start
            self.assertEqual(want[:20], [one.values for one in lookups])
            self.assertTrue(0.05 < took < 0.9, took)
            resolver = self.resolver(server)
            with descriptors_left(4):
                lookups = resolver.ask(questions)
            self.assertEqual(want, [one.values for one in lookups])
            self.resolver(server).ask(questions[20:] * 2)
        self.assertGreater(len(ids), 50)
        self.assertGreater(max(ids) - min(ids), 1000)

    def test_no_descriptor(self):
        """None for the first question is no server's fault.  One that none
        becomes free for in its time is a failure for now."""
        with self.server({'silent': True}) as server:
            resolver = self.resolver(server, timeout=0.3)
            with descriptors_left(0), self.assertRaises(OSError) as caught:
                resolver.ask([(self.NAME, 1)])
            self.assertEqual(errno.EMFILE, caught.exception.errno)
            with descriptors_left(2):
                lookups = resolver.ask([(self.NAME, 1)] * 6)
            self.assertEqual(['temporary'] * 6,
                             [lookup.status for lookup in lookups])

    def test_wait(self):
        """Nothing is waited for at the deadline, not even what is ready."""
        left, right = socket.socketpair()
        with left, right:
            right.send(b'x')
            now = time.monotonic()
            self.check(([left], []), qr.wait, [left], [], now + 5)
            self.check(([left], [right]), qr.wait, [left], [right], now + 5)
            self.check(qr.TimedOut, qr.wait, [left], [right], now)
            self.check(qr.TimedOut, qr.wait, [right], [], now + 0.01)

    def test_woken_for_nothing(self):
        """A socket is called ready, but nothing has come (a packet with a
        wrong checksum): the wait goes on."""
        for options in b'', TCP_ONLY:
            with self.server({'delay': 0.2}) as server:
                resolver, woken = self.resolver(server, options=options), []

                def wait(reading, writing, deadline):
                    if reading and len(woken) < 3:
                        woken.append(reading)
                        return list(reading), []
                    return qr.wait(reading, writing, deadline)
                resolver.wait = wait
                self.check(self.GOOD, self.ask, resolver)
                self.assertEqual(3, len(woken))

    def test_no_free_port(self):
        """Then the kernel chooses."""
        tried = []

        class Taken:
            def bind(self, place):
                tried.append(place)
                raise OSError(errno.EADDRINUSE, 'taken')
        self.check(None, qr.bind_random_port, Taken(), socket.AF_INET)
        self.assertEqual(8, len(tried))

    def test_who_is_believed(self):
        """AD counts from a trusted server, and only if each step had it."""
        for ad, trusted, want in ((True, True, True), (True, False, False),
                                  (False, True, False)):
            with self.server(ad=ad) as server:
                resolver = self.resolver(server)
                resolver.config.trusted = trusted
                for name in self.NAME, dns_name('nowhere.test'):
                    lookup, = resolver.ask([(name, 1)])
                    self.assertEqual(want, lookup.authentic)

    def test_steps(self):
        """A CNAME alone is followed, unless a SOA says that there is no
        more; the whole is as authentic as its weakest step."""
        other = dns_name('n.test')

        class Steps(qr.Resolver):
            def _any_server(self, name, qtype, end):
                return steps.pop(0)
                yield
        link, last = (self.NAME, qr.CNAME, other), (other, 1, b'192.0.2.1')

        def answer(record, authentic, has_soa=False):
            return qr.Answer(0, False, False, [record], has_soa, authentic)
        for steps, *want in (
                ([answer(link, True), answer(last, True)], *self.GOOD, True),
                ([answer(link, False), answer(last, True)],
                 *self.GOOD, False),
                ([answer(link, True), answer(last, False)],
                 *self.GOOD, False),
                ([answer(link, True, True)], 'ok', [], True)):
            resolver = Steps(qr.parse_resolv_conf(b''), None, lambda: 0)
            self.assertEqual([qr.Lookup(*want, other)],
                             resolver.ask([(self.NAME, 1)]))
            self.assertEqual([], steps)


# Where to

TEMP = 'temporary'


class Zone:
    """A resolver that answers from {'name TYPE': values}; a value of TEMP
    fails for now.  A name without an entry does not exist.  late: the keys of
    what is answered only to those who do not hurry; ad: whether all answers
    but those to the keys in unsigned are authentic."""

    def __init__(self, records, late=(), ad=False, unsigned=()):
        self.records, self.asked, self.ad = {}, [], ad
        self.late, self.unsigned = ({
            (dns_name(key.split(' ')[0]), DNS_TYPES[key.split(' ')[1]])
            for key in keys} for keys in (late, unsigned))
        for key, values in records.items():
            name, kind = key.split(' ')
            if kind == 'MX' and values != TEMP:
                values = [(preference, dns_name(target))
                          for preference, target in values]
            elif values != TEMP and kind != 'TLSA':
                values = [value.encode() for value in values]
            self.records[dns_name(name), DNS_TYPES[kind]] = values

    def trusted(self):
        return self.ad

    def ask(self, questions, enough=None):
        self.asked.append(list(questions))
        lookups = [self.one(*question) for question in questions]
        if enough and self.late and enough([
                None if question in self.late else lookup
                for question, lookup in zip(questions, lookups)]):
            lookups = [
                qr.Lookup(qr.Lookup.LATE, [], False, question[0])
                if question in self.late else lookup
                for question, lookup in zip(questions, lookups)]
        return lookups

    def one(self, name, kind):
        values, end, ad = self.records.get((name, kind)), name, self.ad
        if (name, qr.CNAME) in self.records and kind != qr.CNAME:
            end = dns_name(self.records[name, qr.CNAME][0].decode())
            values = self.records.get((end, kind))
        ad = ad and (name, kind) not in self.unsigned
        if kind == qr.CNAME and values:
            values = [dns_name(value.decode()) for value in values]
        if values == TEMP:
            return qr.Lookup(qr.Lookup.TEMPORARY, [], False, name)
        if values is None and end not in {n for n, _ in self.records}:
            return qr.Lookup(qr.Lookup.NO_NAME, [], ad, end)
        return qr.Lookup(qr.Lookup.OK, values or [], ad, end)


def rows(text):
    """The cells of a table in text: a row a line, two blanks between cells,
    a comment after #."""
    for line in text.strip().splitlines():
        yield re.split(r'\s{2,}', line.split('#')[0].strip())


class WhereTo(Tables):

    OWN = '192.0.2.99'
    A, BOTH = ['192.0.2.1'], ['192.0.2.4']
    # Their addresses are shown by these names, IPv6 ones with a 6.
    HOSTS = {
        'a A': A, 'b A': ['192.0.2.2'], 'c A': ['192.0.2.3'], 'both A': BOTH,
        'both AAAA': ['2001:db8::4'], 'six AAAA': ['2001:db8::6'],
        'gone TXT': [], 'later A': TEMP, 'later AAAA': TEMP,
        'half A': TEMP, 'half AAAA': ['2001:db8::5'], 'other A': ['192.0.2.5'],
        'other AAAA': TEMP, 'vain A': TEMP, 'vain AAAA': [], 'lost A': [],
        'lost AAAA': TEMP, 'mixed A': ['192.0.2.7', OWN], 'me A': [OWN],
        'myself A': ['192.0.2.8'], 'myself AAAA': ['2001:db8::99'],
        'h A': ['192.0.2.10']}
    NAMES = {address: key.split()[0] + '6' * key.endswith('AAAA')
             for key, values in HOSTS.items() if values != TEMP
             for address in values}
    REPORTS = {qr.OWN_ADDRESS: 'OWN', qr.DNS_TEMPORARY: 'TEMP',
               qr.NO_ADDRESS: 'NO ADDRESS', qr.NULL_MX % b'h': 'NULL',
               qr.NO_HOST % b'h': 'NO HOST', qr.NO_RELAY % b'gone': 'RELAY',
               qr.NO_RELAY % b'no': 'RELAY'}

    def own(self, address):
        return address in (self.OWN.encode(), b'2001:db8::99')

    def shown(self, addresses):
        return [self.NAMES.get(text, text)
                for text in map(bytes.decode, addresses)]

    def servers(self, host, zone, relay=None, **options):
        return qr.find_servers(host, qr.Route(relay, None, None), zone,
                               self.own, **options)

    def find(self, host, records, relay=None):
        """The addresses in order, or a report, as words."""
        zone = records if isinstance(records, Zone) else Zone(records)
        found = self.servers(host, zone, relay)
        self.assertFalse(found.incomplete)
        self.assertEqual(not found.servers, bool(found.report))
        return self.REPORTS.get(found.report, found.report) or ' '.join(
            self.shown([server.address for server in found.servers]))

    def exchangers(self, text):
        """All records, with these as the MX of h."""
        return dict(self.HOSTS, **{'h MX': [
            (int(pair.split()[0]), pair.split()[1])
            for pair in text.split(', ')]})

    def test_exchangers(self):
        for text, want in rows('''
                20 a, 10 b, 30 c                b a c
                65535 a, 0 b                    b a
                100 a, 9 b                      b a         # as numbers
                10 a, 10 a                      a
                30 a, 10 a, 20 b                a b
                10 both, 20 a                   both both6 a
                10 six, 20 a                    six6 a
                0 .                             NULL
                10 .                            NULL
                0 ., 10 a                       a
                10 192.0.2.77                   192.0.2.77
                10 192.0.2.256, 20 a            a
                10 no, 20 a                     a
                10 gone, 20 a                   a
                10 no                           NO ADDRESS
                10 gone                         NO ADDRESS
                10 no, 20 gone                  NO ADDRESS
                10 later, 20 a                  a
                10 a, 20 later                  a
                10 later                        TEMP
                10 later, 20 no                 TEMP
                10 vain                         TEMP
                10 vain, 5 a                    a
                10 half                         half6       # what is known
                10 other                        other
                10 224.0.0.1                    224.0.0.1
                10 me                           OWN
                10 me, 20 a                     OWN
                10 me, 10 a                     OWN
                20 me, 10 a, 30 b               a
                30 me, 10 a, 20 b               a b
                10 mixed, 20 a                  OWN
                10 myself, 20 a                 OWN         # its IPv6
                10 a, 20 me, 30 me, 40 b        a
                10 192.0.2.99, 20 a             OWN
                10 later, 20 me                 TEMP
                10 later, 15 a, 20 me           a
                20 later, 20 me                 OWN
                30 later, 20 me                 OWN
                10 a, 20 me, 30 later           a'''):
            self.check(want, self.find, b'h', self.exchangers(text))

    def test_hosts_without_exchangers(self):
        for host, want in rows('''
                both    both both6
                six     six6
                gone    NO ADDRESS
                me      OWN
                mixed   OWN
                later   TEMP
                vain    TEMP
                lost    TEMP
                half    half6
                other   other'''):
            self.check(want, self.find, host.encode(), self.HOSTS)
        self.check('NO HOST', self.find, b'h', {})
        self.check('TEMP', self.find, b'h', {'h MX': TEMP, 'h A': self.A})

    def test_no_question(self):
        """None is asked for what is no name, and for an address."""
        for host, want in (
                (b'', b''), (b'.', b'.'), (b'a..b', b'a..b'),
                (b'a b', b'a?b'), (b'[300.1.1.1]', b'[300.1.1.1]'),
                (b'[::1', b'[::1'), (b'x' * 64, b'x' * 64),
                (b'a\r\nb', b'a??b'), (b'\xff', b'?'),
                (b'192.0.2.1', 'a'), (b'[192.0.2.1]', 'a'),
                (b'[IPv6:2001:DB8::6]', 'six6'), (b'[192.0.2.99]', 'OWN')):
            zone = Zone({})
            self.check(want if isinstance(want, str) else qr.NO_HOST % want,
                       self.find, host, zone)
            self.assertEqual([], zone.asked)
        self.check(qr.NO_HOST % b'1.2.3.4.', self.find, b'1.2.3.4.', {})
        self.check('a', self.find, b'UPPER.case.', {'upper.case A': self.A})

    def test_relays(self):
        """Addresses only, no exchangers, no own-address rule, and no D."""
        records = dict(self.HOSTS, **{'both MX': [(1, 'a')]})
        for relay, want in (
                (b'both', 'both both6'), (b'me', 'me'), (b'192.0.2.1', 'a'),
                (b'[2001:db8::6]', 'six6'), (b'192.0.2.99', 'me'),
                (b'no', 'RELAY'), (b'gone', 'RELAY'), (b'later', 'TEMP')):
            zone = Zone(records)
            self.check(want, self.find, b'h', zone, relay)
            for questions in zone.asked:
                self.assertNotIn(qr.MX, [kind for _, kind in questions])

    def test_ports_and_names(self):
        """Each Server knows whose address it is."""
        zone = Zone({'h MX': [(10, 'a.example')], 'a.example A': self.A})
        for host, relay, port, want in (
                (b'h', None, None, (b'a.example', 25)),
                (b'h', None, 26, (b'a.example', 26)),
                (b'h', b'a.example', 26, (b'a.example', 26)),
                (b'[::2]', None, None, (b'::2', 25))):
            server, = qr.find_servers(host, qr.Route(relay, port, None),
                                      zone, self.own).servers
            self.assertEqual(want, (server.name, server.port))

    def hurry(self, records, late, relay=None, **options):
        """The addresses that are tried at once, and after a | those that
        are tried when these have failed."""
        zone = Zone(records, late, **options)

        def find(hurry=False):
            return self.servers(b'h', zone, relay, hurry=hurry)
        found = find(True)
        if found.report:
            return self.REPORTS[found.report]
        self.assertNotIn(qr.Tlsa.UNKNOWN, [
            server.tlsa.status for server in found.servers])
        at_once = self.shown([server.address for server in found.servers])
        every = self.shown([server.address for server in qr.late_ones(
            found.servers, find)])
        self.assertEqual(len(every), len(set(every)))
        self.assertEqual(at_once, every[:len(at_once)])
        return ' '.join(at_once + ['|'] + every[len(at_once):]
                        if found.incomplete else at_once)

    def test_hurry(self):
        """After two seconds the best will do, if all of them are known.
        What is late may be this host: nothing that is not better is tried
        before that is known."""
        for text, late, want in rows('''
                10 both, 20 b, 30 c     -                   both both6 b c
                10 both, 20 b, 30 c     b A                 both both6 | b c
                10 both, 20 b, 30 c     b AAAA              both both6 | b c
                10 both, 20 b, 30 c     c A, c AAAA         both both6 b | c
                10 both, 20 b, 30 c     both AAAA           both b c | both6
                10 both, 20 b, 30 c     both A              both6 b c | both
                10 both, 20 b, 30 c     both A, both AAAA   both both6 b c
                10 six, 20 b            six A, b A          six6 | b
                10 b, 20 c              b A, c A            b c
                5 gone, 10 both, 20 c   c A                 both both6 | c
                5 later, 10 both, 20 c  c A                 both both6 | c
                5 gone, 10 both, 20 c   c A, gone A         both both6 c
                10 192.0.2.77, 20 b     b A, b AAAA         192.0.2.77 | b
                10 b, 20 later          later A, later AAAA  b |
                10 both, 20 me, 30 c    me A                both both6 |
                10 a, 20 me, 20 b, 30 c  me A               a |
                10 both, 20 me, 30 c    c A, c AAAA         both both6 |
                10 me, 20 b             b A                 OWN
                10 a, 10 me, 20 b       b A                 OWN
                5 later, 10 me, 20 b    b A                 TEMP
                5 b, 10 me, 20 c        b A                 b'''):
            self.check(want, self.hurry, self.exchangers(text),
                       [] if late == '-' else late.split(', '))
        self.assertNotIn('|', self.hurry(self.exchangers('10 a, 10 b'),
                                         ['b A', 'b AAAA']))
        self.check('both | both6', self.hurry, self.HOSTS, ['both AAAA'],
                   b'both')
        self.check('both both6', self.hurry, self.HOSTS,
                   ['both A', 'both AAAA'], b'both')

    def test_hurry_and_dane(self):
        """TLSA records that are late may be there: nobody is tried as if
        there were none."""
        tlsa, second = '_25._tcp.both TLSA', '_25._tcp.b TLSA'
        records = self.exchangers('10 both, 20 b')
        every, parts, unsigned = 'both both6 b', 'both both6 | b', (
            'both A', 'both AAAA')
        alias = dict(records, **{'x A': self.BOTH, 'both CNAME': ['x']})
        del alias['both A'], alias['both AAAA']
        for zone, late, want, options in (
                (records, (tlsa, 'b A'), every, ()),
                (records, (second,), parts, ()),
                (records, (tlsa, 'b A'), parts, unsigned),
                (records, (tlsa, 'b A'), every, (tlsa,)),
                (records, (tlsa, 'b A'), every, ('both AAAA',)),
                (alias, (tlsa, 'b A'), 'both b', unsigned),
                (alias, ('b A',), 'both | b', unsigned)):
            with self.subTest(late=late, unsigned=options):
                self.check(want, lambda: self.hurry(
                    zone, late, ad=True, unsigned=options))
        self.check(qr.UNKNOWN_TLSA, qr.dane_records, [], qr.Lookup(
            qr.Lookup.LATE, [], False, b''))

    def test_ties(self):
        """Equal preferences in random order, others never."""
        records = self.exchangers('10 a, 10 b, 20 c')
        self.assertEqual({'a b c', 'b a c'}, {
            self.find(b'h', records) for _ in range(200)})
        self.assertEqual({(1, 2), (2, 1)}, {
            tuple(qr.shuffled([1, 2])) for _ in range(200)})

    def test_many(self):
        """120 exchangers: two rounds of questions, the best 20 addresses.
        Those that are not looked up may have one."""
        records = {'h MX': [(i * 546, 'm%d' % i) for i in range(120, 0, -1)]}
        for i in range(1, 121):
            records['m%d A' % i] = ['198.51.100.%d' % i]
            records['m%d AAAA' % i] = ['2001:db8:1::%x' % i]
        zone = Zone(records)
        best = [records['m%d %s' % (i, kind)][0] for i in range(1, 11)
                for kind in ('A', 'AAAA')]
        self.check(' '.join(best), self.find, b'h', zone)
        self.assertEqual([1, 240], [len(batch) for batch in zone.asked])
        for count, host, want in (
                (128, 'm0', 'a'), (129, 'm0', 'a'), (129, 'm128', 'TEMP'),
                (128, 'm128', 'NO ADDRESS')):
            self.check(want, self.find, b'h', {
                'h MX': [(i, 'm%d' % i) for i in range(count)],
                host + ' A': self.A})

    def test_twenty(self):
        """No more are tried.  A foreign name server can name thousands: that
        must not cost more than one look at each."""
        for number, want in ((19, 19), (20, 20), (21, 20), (8000, 20)):
            addresses = ['10.%d.%d.9' % divmod(i, 256) for i in range(number)]
            start = time.process_time()
            self.check(want, lambda: len(self.find(
                b'h', {'h A': addresses}).split()))
            self.check(want, lambda: len(self.find(b'h', dict(
                [('m%d A' % i, addresses[i::10]) for i in range(10)],
                **{'h MX': [(i, 'm%d' % i) for i in range(10)]})).split()))
            self.assertLess(time.process_time() - start, 0.5)
        self.check('a', self.find, b'h', {
            'h MX': [(i, 'm%d' % i) for i in range(100)],
            'm0 A': self.A * 30})

    def test_literal_target(self):
        for name, want in (
                ('192.0.2.1', b'192.0.2.1'),
                ('255.255.255.255', b'255.255.255.255'),
                ('0.0.0.0', b'0.0.0.0'), ('192.0.2.256', None),
                ('192.0.2', None), ('192.0.2.1.5', None), ('1a.2.3.4', None),
                ('a.example', None), ('1', None)):
            self.check(want, lambda name: qr.literal_target(dns_name(name)),
                       name)
        self.check(None, qr.literal_target, b'\x031.2\x013\x014\x015\0')
        self.check(None, qr.literal_target, b'\0')

    def test_own_address(self):
        own = qr.OwnAddresses(
            qr.parse_networks(b'192.0.2.1\n192.0.2.3\n198.51.100.0/24\n'),
            qr.parse_networks(b'192.0.2.2\n192.0.2.3\n127.0.0.9\n'
                              b'198.51.100.128/25\n'),
            lambda address: address in (b'192.0.2.2', b'192.0.2.4'))
        for want, addresses in (
                (True, '192.0.2.1 192.0.2.4 198.51.100.1 0.0.0.0 0.1.2.3 :: '
                 '127.0.0.1 127.0.0.2 127.255.255.255 ::1'),
                (False, '192.0.2.2 192.0.2.3 192.0.2.5 198.51.100.129 '
                 '127.0.0.9 ::2 128.0.0.1 10.0.0.1 1270::1')):
            for address in addresses.split():
                self.check(want, own, address.encode())

    def test_is_local(self):
        for address, want in (
                (b'127.0.0.1', True), (FOREIGN, False),
                (b'224.0.0.1', False), (b'239.255.255.255', False),
                (b'255.255.255.255', False), (b'::1', HAS_IPV6),
                (FOREIGN_IPV6, False), (b'ff02::1', False)):
            self.check(want, qr.is_local, address)

    def test_is_local_where_any_address_can_be_bound(self):
        """ip_nonlocal_bind, secondary addresses, one of RFC 5737 here."""
        commands = """
            ip link set lo up
            ip link add d0 type veth peer name d1
            ip link set d0 up; ip link set d1 up
            ip addr add 10.9.0.1/24 dev d0
            ip addr add 10.9.0.2/24 dev d0      # secondary
            ip addr add 192.0.2.1/32 dev lo
            ip route add local 10.77.0.0/16 dev lo
            ip route add default via 10.9.0.254
            ip addr add 2001:db8:9::1/64 dev d0 nodad
            ip addr add 2001:db8:9::2/64 dev d0 nodad preferred_lft 0
            ip addr add 2001:db8::1/128 dev lo
            ip -6 route add default via 2001:db8:9::ffff
            sysctl -qw net.ipv4.ip_nonlocal_bind=$1
            sysctl -qw net.ipv6.ip_nonlocal_bind=$1
            exec "$0" -c 'import sys, qmail_remote as qr
for address in sys.argv[2:]:
    print(qr.is_local(address.encode()))' "$@" """
        ours = ('10.9.0.1 10.9.0.2 192.0.2.1 10.77.0.5 127.0.0.9 ::1 '
                '2001:db8:9::1 2001:db8:9::2 2001:db8::1').split()
        theirs = ('10.9.0.3 10.9.0.255 10.9.0.0 192.0.2.2 198.51.100.1 '
                  '224.0.0.1 255.255.255.255 2001:db8:9::3 2001:db8:7::7 '
                  'ff02::1 fe80::1').split()
        enter = ['unshare', '-Urn', 'sh', '-ec']
        if subprocess.call(enter + ['ip link add d0 type veth'],
                           stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL):
            self.skipTest('no network namespace with a veth')
        for nonlocal_bind in '0', '1':
            output = subprocess.check_output(
                enter + [commands, sys.executable, nonlocal_bind]
                + ours + theirs,
                env=dict(os.environ, PYTHONPATH=os.path.dirname(
                    os.path.abspath(qr.__file__)),
                    PYTHONDONTWRITEBYTECODE='1'))
            self.assertEqual(
                ['True'] * len(ours) + ['False'] * len(theirs),
                output.decode().split(), nonlocal_bind)

    def test_no_socket(self):
        """A family that this host does not know has none of its addresses;
        that there are too few descriptors says nothing."""
        self.check(False, qr.family_has, 9999, b'192.0.2.1')
        with descriptors_left(0), self.assertRaises(OSError) as caught:
            qr.is_local(b'192.0.2.1')
        self.assertEqual(errno.EMFILE, caught.exception.errno)


class TimedOutServers(Tables):
    """queue/lock/tcpto, by the rules of tcpto.c: records here are
    (address, count, time) with marks in all bytes that must stay."""

    NOW = 1000000000
    HERE, THERE = b'192.0.2.1', b'192.0.2.2'

    def setUp(self):
        handle, self.path = tempfile.mkstemp(prefix='tcpto-')
        os.close(handle)
        self.addCleanup(lambda path: os.path.exists(path) and
                        os.unlink(path), self.path)
        self.clock = VirtualClock(self.NOW)

    def write(self, *records, size=1024):
        table = b''.join(
            socket.inet_aton(address.decode()) + bytes([count]) + b'abc' +
            struct.pack('<L', when & 0xffffffff) + b'wxyz'
            for address, count, when in records)
        with open(self.path, 'wb') as f:
            f.write((table + bytes(size))[:size])

    def bytes_of_file(self):
        with open(self.path, 'rb') as f:
            return f.read()

    def records(self):
        """The records that are not all zeros."""
        table = self.bytes_of_file()
        return [(socket.inet_ntoa(table[at:at + 4]).encode(), table[at + 4],
                 struct.unpack('<L', table[at + 8:at + 12])[0])
                for at in range(0, len(table) - 15, 16)
                if table[at:at + 16] != bytes(16)]

    def tcpto(self, pid=0):
        return qr.TcpTo(self.path, self.clock, pid, self.clock.wait,
                        self.clock)

    def test_skip(self):
        """While count >= 2 and age < (60 + (pid & 31)) * 64 seconds."""
        for count, age, pid, want in (
                (0, 1, 0, False), (1, 1, 0, False), (2, 0, 0, True),
                (2, 3839, 0, True), (2, 3840, 0, False), (10, 3839, 0, True),
                (10, 3840, 0, False), (2, 5823, 31, True),
                (2, 5824, 31, False), (2, 3839, 32, True),
                (2, 3840, 32, False), (2, 4000, 3 + 64, True),
                (255, 1, 0, True), (2, -3600, 0, False)):
            self.write((self.THERE, 0, 0), (self.HERE, count, self.NOW - age))
            before = self.bytes_of_file()
            self.check(want, self.tcpto(pid).skip, self.HERE)
            self.check(False, self.tcpto(pid).skip, b'192.0.2.3')
            self.assertEqual(before, self.bytes_of_file())

    def test_timed_out(self):
        now = self.NOW

        def here(count, age=0):
            return self.HERE, count, now - age

        def there(count, age=0):
            return self.THERE, count, now - age
        third = b'192.0.2.3', 1, now
        for before, after in (
                ([], [here(1)]), ([there(2, 5)], [there(2, 5), here(1)]),
                # the first place with count 0, but its own one if it has one
                ([there(0), third], [here(1), third]),
                ([there(0, 5), here(0, 5)], [there(0, 5), here(1)]),
                # again within two minutes, and later
                ([here(1)], [here(1)]), ([here(1, 119)], [here(1, 119)]),
                ([here(1, 120)], [here(2)]), ([here(0, 1)], [here(1)]),
                ([here(9, 999)], [here(10)]), ([here(10, 999)], [here(10)]),
                ([here(255, 999)], [here(10)]),
                ([here(3, -3600)], [here(4)])):     # the clock was set back
            self.write(*before)
            self.tcpto().timed_out(self.HERE)
            self.check(after, self.records)

    def test_full(self):
        """A newcomer takes the place with the least time + count * 1024."""
        for stale in (
                {40: (1, self.NOW - 100)},
                {39: (3, self.NOW - 2000), 40: (1, self.NOW - 1)},
                {39: (2, self.NOW), 40: (3, self.NOW - 3000)},
                {40: (1, self.NOW - 7), 41: (1, self.NOW - 7)}):
            records = [(b'198.51.100.%d' % i,) + stale.get(i, (1, self.NOW))
                       for i in range(64)]
            self.write(*records)
            self.tcpto().timed_out(self.HERE)
            records[40] = self.HERE, 1, self.NOW
            self.check(records, self.records)

    def test_answered(self):
        there = self.THERE, 2, 5
        for before, after in (
                ([there], [there]), ([(self.HERE, 0, 6)], [(self.HERE, 0, 6)]),
                ([there, (self.HERE, 3, 6)], [there, (self.HERE, 0, 6)])):
            self.write(*before)
            tcpto = self.tcpto()
            tcpto.skip(self.HERE)
            tcpto.answered(self.HERE)
            self.check(after, self.records)
        with open(self.path, 'rb') as other:        # nobody has the lock
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def test_bytes_that_stay(self):
        self.write((self.THERE, 2, 5), (self.HERE, 2, 5))
        for act in ('timed_out', 'answered'):
            tcpto, before = self.tcpto(), self.bytes_of_file()
            tcpto.skip(self.HERE)
            getattr(tcpto, act)(self.HERE)
            after = self.bytes_of_file()
            self.assertNotEqual(before, after)
            changed = [at for at in range(1024) if before[at] != after[at]]
            self.assertTrue(set(changed) <= {20, 24, 25, 26, 27}, changed)
        self.tcpto().timed_out(b'192.0.2.3')
        self.tcpto().timed_out(b'192.0.2.4')
        self.assertEqual(b'abc', self.bytes_of_file()[21:24])
        self.assertEqual(b'wxyz', self.bytes_of_file()[28:32])

    def use(self, address=HERE):
        """Everything once; whether the address was to be skipped."""
        tcpto = self.tcpto()
        skipped = tcpto.skip(address)
        tcpto.timed_out(address)
        tcpto.answered(address)
        return skipped

    def test_other_sizes(self):
        """The file keeps its size, whatever that is."""
        records = [(b'198.51.100.%d' % i, 2, self.NOW - i) for i in range(64)]
        for size in 0, 1, 15, 16, 17, 1000, 1008, 1024, 1040, 5000:
            self.write(*records, size=size)
            before = self.bytes_of_file()
            self.check(False, self.use, self.HERE)
            after, whole = self.bytes_of_file(), min(size, 1024) // 16 * 16
            self.assertEqual((size, size >= 16), (len(after), before != after))
            self.assertEqual(before[whole:], after[whole:])

    def test_do_without(self):
        self.write((self.HERE, 5, self.NOW))
        before = self.bytes_of_file()
        self.check(True, self.tcpto().skip, self.HERE)
        self.check(False, self.use, b'2001:db8::1')     # IPv4 only
        self.assertEqual(before, self.bytes_of_file())
        os.unlink(self.path)
        self.check(False, self.use, self.HERE)
        self.assertFalse(os.path.exists(self.path))
        os.mkfifo(self.path)
        self.check(False, self.use, self.HERE)
        os.unlink(self.path)
        self.path = tempfile.gettempdir()
        self.check(False, self.use, self.HERE)

    def test_a_lock_that_stays(self):
        """It is waited for, in steps of 10 ms, for one second in all."""
        self.write((self.HERE, 5, self.NOW))
        before, start, waits = self.bytes_of_file(), self.clock.now, []

        def wait(reading, writing, deadline):
            waits.append((len(reading + writing),
                          round(deadline - self.clock.now, 6)))
            if until and self.clock.now > until:
                fcntl.flock(other, fcntl.LOCK_UN)
            self.clock.wait(reading, writing, deadline)
        until, tcpto = None, qr.TcpTo(self.path, self.clock, 0, wait,
                                      self.clock)
        with open(self.path, 'rb') as other:            # another process'
            fcntl.flock(other, fcntl.LOCK_EX)
            for _ in range(3):
                self.check(False, tcpto.skip, self.HERE)
                self.assertAlmostEqual(1, self.clock.now - start, 4)
                tcpto.timed_out(self.HERE)
            self.assertEqual({(0, .01)}, set(waits[:99]))
            self.assertLessEqual(len(waits), 101)
            self.assertEqual(before, self.bytes_of_file())
            until = self.clock.now + .95                # given back
            self.check(True, qr.TcpTo(self.path, self.clock, 0, wait,
                                      self.clock).skip, self.HERE)

    def in_processes(self, count, act, locked=None):
        """act(number, TcpTo) in so many processes, at once; how many times
        it was true.  locked: a file that keeps its lock for a moment."""
        gate, pids = os.pipe(), []
        for number in range(count):
            pid = os.fork()
            if not pid:
                status = 2
                try:
                    os.close(gate[1])
                    os.read(gate[0], 1)
                    tcpto = qr.TcpTo(self.path, self.clock, 0, qr.wait)
                    status = 0 if act(number, tcpto) else 1
                finally:
                    os._exit(status)
            pids.append(pid)
        for fd in gate:
            os.close(fd)
        if locked:
            time.sleep(.05)
            fcntl.flock(locked, fcntl.LOCK_UN)
        ends = [os.waitpid(pid, 0)[1] for pid in pids]
        self.assertLessEqual(set(ends), {0, 256})
        return ends.count(0)

    def test_a_hundred_processes(self):
        """Each time-out is noted, and each is told of a dead server."""
        with open(self.path, 'rb') as other:
            for _ in range(2):
                self.write((self.HERE, 5, self.NOW))
                fcntl.flock(other, fcntl.LOCK_EX)
                self.in_processes(60, lambda number, tcpto: tcpto.timed_out(
                    b'10.0.0.%d' % number), other)
                self.assertEqual(
                    [self.HERE] + sorted(b'10.0.0.%d' % i for i in range(60)),
                    sorted((address for address, count, _ in self.records()),
                           key=lambda address: (address != self.HERE,
                                                address)))
                self.assertEqual(100, self.in_processes(
                    100, lambda number, tcpto: tcpto.skip(self.HERE)))

    @unittest.skipIf(os.getuid() == 0, 'root can write everything')
    def test_read_only(self):
        self.write((self.HERE, 5, self.NOW))
        os.chmod(self.path, 0o444)
        before = self.bytes_of_file()
        self.use()
        self.assertEqual(before, self.bytes_of_file())

    def test_2106(self):
        """Time is 32 bits; nothing breaks when they run over."""
        self.write((self.HERE, 2, 0xffffff00))
        self.clock.now = (1 << 32) + 5
        self.check(True, self.tcpto().skip, self.HERE)
        self.clock.now += 4000
        self.check(False, self.tcpto().skip, self.HERE)
        self.tcpto().timed_out(self.HERE)
        self.assertEqual([(self.HERE, 3, 4005)], self.records())


# The line

class Scripted:
    """In place of a socket: each recv() and send() takes the next of its
    list, bytes or a number of bytes sent, or an error to raise."""

    def __init__(self, received=(), sent=()):
        self.received, self.sent = iter(received), iter(sent)
        self.data = b''

    def recv(self, size):
        what = next(self.received, BlockingIOError())
        if isinstance(what, Exception):
            raise what
        return what

    def send(self, data):
        what = next(self.sent, len(data))
        if isinstance(what, Exception):
            raise what
        self.data += bytes(data[:what])
        return min(what, len(data))


class LineTables(Tables):

    def setUp(self):
        self.clock = VirtualClock(step=1)

    def scripted(self, received=(), sent=()):
        """A line on which everything can happen at any time; each wait
        takes a second."""
        return qr.Connection(Scripted(received, sent), self.clock.at_once,
                       self.clock)

    def pair(self):
        """A line, and the peer's end of it."""
        left, right = socket.socketpair()
        self.addCleanup(left.close)
        self.addCleanup(right.close)
        left.setblocking(False)
        left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        right.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        return qr.Connection(left, self.clock.wait, self.clock), right

    def lost(self, function, *args):
        """The diagnostic of the ConnectionLost that must come."""
        with self.assertRaises(qr.ConnectionLost) as caught:
            function(*args)
        return caught.exception.diagnostic

    def test_send(self):
        line, peer = self.pair()
        self.check(True, line.send, b'QUIT\r\n', 7)
        self.assertEqual(b'QUIT\r\n', peer.recv(99))
        self.check(True, line.send, b'', 7)
        peer.close()
        self.check(b'broken pipe', self.lost, line.send, b'QUIT\n', 7)
        self.check(b'connection reset by peer', self.lost, self.scripted(
            sent=[2, OSError(errno.ECONNRESET, '')]).send, b'12345', 7)
        # The time is for all of it, not for each byte.
        self.assertEqual(1000, self.clock.now)
        sent = [BlockingIOError(), 1] * 100
        self.check(b'timed out', self.lost, self.scripted(sent=sent).send,
                   b'x' * 20, 7)
        self.assertEqual(1007, self.clock.now)
        line = self.scripted(sent=sent)
        self.check(True, line.send, b'1234567', 9)
        self.assertEqual(b'1234567', line.sock.data)

    def test_send_to_a_peer_that_does_not_read(self):
        line, peer = self.pair()
        self.check(b'timed out', self.lost, line.send, bytes(10000000), 7)
        self.assertEqual(1007, self.clock.now)

    def test_stop_on_input(self):
        line, peer = self.pair()
        peer.send(b'552 enough\r\n')
        self.check(False, line.send, bytes(10000000), 7, True)
        self.check(552, lambda: line.reply(7).code)
        line, peer = self.pair()
        peer.shutdown(socket.SHUT_WR)
        self.check(False, line.send, bytes(10000000), 7, True)

    def test_reply(self):
        line, peer = self.pair()
        peer.send(b'250-a\r\n250 b\r\n354 go\r\n')
        reply = line.reply(7)
        self.assertEqual((250, b'250-a\n250 b\n'), (reply.code, reply.text))
        self.check(True, line.input_pending)
        self.check(354, lambda: line.reply(7).code)
        self.check(False, line.input_pending)
        peer.send(b'2')
        self.check(True, line.input_pending)
        peer.send(b'21 x\n')
        self.check(221, lambda: line.reply(7).code)
        peer.close()
        self.check(True, line.input_pending)
        self.check(b'connection closed', self.lost, line.reply, 7)

    def test_a_reply_that_came_while_we_were_stopped(self):
        """It may wait for us when its time is over; whoever drips gets no
        more than that one look."""
        def late(*args):
            self.clock.now += 100
        line = self.scripted([b'250 queued\r\n'])
        line.wait = late
        self.check(250, lambda: line.reply(7).code)

        def wait(*args):
            raise qr.TimedOut()
        for received, want in (
                ([b'250 queued\r\n'], 250), ([b'250 queu', b'ed\r\n'], None),
                ([b''], None), ([BlockingIOError(), b'250 ok\r\n'], None),
                ([OSError(errno.ECONNRESET, '')], None)):
            line = self.scripted(received)
            line.wait = wait
            self.check(want or qr.ConnectionLost, lambda: line.reply(7).code)

    def test_reply_troubles(self):
        endless = [b'250-x\r\n'] * 10000
        slow = [x for pair in zip([BlockingIOError()] * 99, endless)
                for x in pair]
        for received, note in (
                ([], b'timed out'), (slow, b'timed out'),
                ([x for byte in b'220 hello'        # one byte each second
                  for x in (BlockingIOError(), bytes([byte]))],
                 b'timed out'),
                ([b''], b'connection closed'),
                ([b'250-a\r\n', b'250 b', b''], b'connection closed'),
                ([b'250-', OSError(errno.ECONNRESET, '')],
                 b'connection reset by peer'),
                ([b'HTTP/1.1 400'], b'no SMTP reply'),
                ([b'250-a\r\n', b'550 b\r\n'], b'no SMTP reply')):
            self.clock.now = 1000
            self.check(note, self.lost, self.scripted(received).reply, 7)
            self.assertLessEqual(self.clock.now, 1007)

    def test_a_flood_ends(self):
        """At the deadline, or when it has become too much for a reply."""
        clock = self.clock

        class Flood:
            def __init__(self, block):
                self.block, self.sent = block, 0

            def recv(self, size):
                self.sent += len(self.block)
                if self.sent > 2 * qr.REPLY_SIZE_MAX:
                    raise AssertionError('without end')
                return self.block
        for block, note in ((b'x\r\n250-', b'timed out'),
                            (b'x\r\n250-' * 9000, b'a reply without end'),
                            (b'x' * 65536, b'a reply without end')):
            clock.now = 1000
            line = qr.Connection(Flood(block), clock.at_once, clock)
            line.input += b'250-'
            self.check(note, self.lost, line.reply, 70)
            self.assertLessEqual(clock.now, 1071)
            self.assertLess(line.sock.sent, qr.REPLY_SIZE_MAX + 131072)

    def test_what_is_left_of_a_dead_connection(self):
        """A whole reply that came before counts; nothing is sent then."""
        reset = OSError(errno.ECONNRESET, '')
        for received, code in (
                ([], None), ([b''], None), ([b'552 no\r\n'], 552),
                ([b'552-no\r\n', b'552 no\n', b''], 552),
                ([b'552 no\n', reset], 552), ([reset], None),
                ([b'552 no', b''], None), ([b'what?\r\n', b''], None),
                ([b'250-x\r\n' * 1000] * 1000, None)):
            line, got = self.scripted(received, [OSError(errno.EPIPE, '')]), \
                None
            with contextlib.suppress(qr.ConnectionLost):
                self.assertFalse(line.send(b'x', 7))
                got = line.reply(7).code
            self.assertEqual((code, 1000), (got, self.clock.now))
            line.send_best_effort(b'QUIT')
            self.assertEqual(b'', line.sock.data)
        self.assertIsNotNone(next(line.sock.received, None))

    def test_whisper(self):
        line, peer = self.pair()
        line.send_best_effort(b'QUIT\r\n')
        self.assertEqual(b'QUIT\r\n', peer.recv(99))
        line.send_best_effort(bytes(10000000))
        line.send_best_effort(bytes(10000000))
        peer.close()
        line.send_best_effort(b'QUIT\r\n')
        self.assertEqual(1000, self.clock.now)
        line.close()
        self.assertEqual(-1, line.sock.fileno())

    def test_connect(self):
        for host in ['127.0.0.1'] + ['::1'] * HAS_IPV6:
            with FakeSMTP('S: 220 hello\nQ:', host) as server:
                line = qr.Connection(qr.connect(host.encode(), server.port, 5))
                self.assertEqual(220, line.reply(5).code)
                line.close()
            self.check(ConnectionRefusedError, qr.connect, host.encode(),
                       server.port, 5)

    def test_reason(self):
        self.check(b'connection refused', qr.error_text,
                   OSError(errno.ECONNREFUSED, ''))
        self.check(b'input/output error', qr.error_text, OSError('no number'))

    def test_no_socket(self):
        """That is not the server's fault: no other one is tried."""
        with descriptors_left(0), self.assertRaises(
                qr.LocalFault) as caught:
            qr.connect(b'127.0.0.1', 9, 1)
        self.assertEqual(qr.NO_RESOURCES, caught.exception.report)

    def test_a_flood_while_we_send(self):
        """It ends at the deadline, and does not fill the memory."""
        clock = self.clock

        class Flood(Scripted):
            seconds, blocks = 0, 0

            def recv(self, size):
                clock.now += self.seconds
                self.blocks += 1
                if self.blocks > 100:
                    raise AssertionError('without end')
                return b'250-x\r\n' * 150000

            def send(self, data):
                raise BlockingIOError()
        for seconds in 0, 1:
            clock.now = 1000
            line = qr.Connection(Flood(), clock.at_once, clock)
            line.sock.seconds = seconds
            self.check(False, line.send, b'QUIT', 7)
            self.assertEqual(b'timed out', line.failure)
            self.assertLessEqual(clock.now, 1024)   # what is there is read
            self.assertLess(len(line.input), qr.BACKLOG_MAX + 2000000)

    def test_reply_waits(self):
        """For input alone: it must not keep the processor busy.  And before
        each look, even if there is always something to read: only wait()
        sees that the launcher has been killed, and lets others run."""
        line, peer = self.pair()
        waits = []

        def wait(*args):
            waits.append(args)
            if len(waits) > 6:
                raise qr.LocalFault(qr.KILLED)
            return (self.clock.wait if len(waits) == 1 else
                    self.clock.at_once)(*args)
        line.wait = wait
        self.check(b'timed out', self.lost, line.reply, 7)
        self.assertEqual([((line.sock,), (), 1007)], waits)
        line = self.scripted([b'250-x\r\n'] * 1000)
        line.wait = wait
        self.check(qr.KILLED, line.reply, 70)
        self.assertEqual(5, 1000 - len(list(line.sock.received)))


# The message

def reference_wire_form(data):
    """What wire_form() must give, for the whole message at once."""
    lines = data.replace(b'\r\n', b'\n').replace(b'\r', b'\n').split(b'\n')
    return b'\r\n'.join(b'.' * line.startswith(b'.') + line for line in lines)


class WireForm(Tables):

    def wire(self, *blocks):
        return b''.join(qr.wire_form(blocks))

    def hold(self, data, blocks):
        """Compares and looks for what must never be on the wire."""
        # A CR at the end waits for its LF: such a message is partial.
        want = reference_wire_form(
            data[:-1] if data.endswith(b'\r') else data)
        got = self.wire(*blocks)
        if got != want:
            self.fail('%r: %r instead of %r' % (blocks, got, want))
        bare = got.replace(b'\r\n', b'')
        if b'\r' in bare or b'\n' in bare or \
                b'\r\n.\r\n' in b'\r\n' + got:
            self.fail('%r: %r' % (blocks, got))

    def test_examples(self):
        for blocks, want in (
                ((), b''), ((b'',), b''), ((b'a\n',), b'a\r\n'),
                ((b'a\r\n',), b'a\r\n'), ((b'a\r', b'\n'), b'a\r\n'),
                ((b'.\n',), b'..\r\n'), ((b'..\n',), b'...\r\n'),
                ((b'a\n', b'.\n'), b'a\r\n..\r\n'),
                ((b'a', b'.\n'), b'a.\r\n'),
                ((b'a\r.\nX\n',), b'a\r\n..\r\nX\r\n'),
                ((b'a\r', b'.\n'), b'a\r\n..\r\n'),
                ((b'a\r\r\nb\n',), b'a\r\n\r\nb\r\n'),
                ((b'\n\r.\r\n',), b'\r\n\r\n..\r\n'),
                ((b'\0\xff\n',), b'\0\xff\r\n')):
            self.check(want, self.wire, *blocks)

    def test_all_short_messages(self):
        """Every string of up to five bytes, cut in every way."""
        messages, ways = [b''], 0
        for _ in range(6):
            for data in messages:
                for cuts in range(1 << max(0, len(data) - 1)):
                    blocks, start = [], 0
                    for at in range(1, len(data)):
                        if cuts >> (at - 1) & 1:
                            blocks.append(data[start:at])
                            start = at
                    self.hold(data, blocks + [data[start:]])
                    ways += 1
            messages = [data + byte for data in messages
                        for byte in (b'a', b'.', b'\r', b'\n')]
        self.assertEqual(1 + sum(4 ** n << (n - 1) for n in range(1, 6)),
                         ways)

    def test_random_messages(self):
        chance = random.Random(2)
        for _ in range(2000):
            data = bytes(chance.choice(b'ab..\r\r\n\n\n\0\xff')
                         for _ in range(chance.randrange(200)))
            cuts = sorted(chance.randrange(len(data) + 1)
                          for _ in range(chance.randrange(10)))
            self.hold(data, [data[start:end] for start, end in
                             zip([0] + cuts, cuts + [len(data)])])

    def test_everything_else_goes_through(self):
        other = bytes(c for c in range(256) if c not in b'\r\n.')
        self.check(other, self.wire, other)
        long = b'x' * 5000000 + b'\n'
        self.assertEqual(long[:-1] + b'\r\n', self.wire(long))


class MessageTables(Tables):

    def setUp(self):
        self.clock = VirtualClock()

    def message(self, fd):
        return qr.Message(fd, 7, self.clock.wait, self.clock)

    def whole(self, fd):
        """Everything that the message yields, after its check."""
        message = self.message(fd)
        message.check()
        return b''.join(message.blocks())

    def test_files(self):
        big = b'x' * 99 + b'\n'
        for data, start, want in (
                (b'a\n', 0, b'a\n'), (b'', 0, b''), (b'a\nb\n', 2, b'b\n'),
                (b'a\n', 2, b''),
                (b'\0\xff\r\n', 0, b'\0\xff\r\n'),
                (big * 5000, 0, big * 5000), (b'a', 0, qr.PARTIAL_LINE),
                (b'a\nb', 0, qr.PARTIAL_LINE), (b'a\nb', 2, qr.PARTIAL_LINE),
                (b'a\r', 0, qr.PARTIAL_LINE)):
            with tempfile.TemporaryFile() as f:
                f.write(data)
                f.flush()
                os.lseek(f.fileno(), start, os.SEEK_SET)
                self.check(want, self.whole, f.fileno())
                # check() alone knows, and leaves the place as it is
                os.lseek(f.fileno(), start, os.SEEK_SET)
                message = self.message(f.fileno())
                self.check(want if want == qr.PARTIAL_LINE else None,
                           message.check)
                self.assertEqual(start, os.lseek(f.fileno(), 0, 1))

    def test_a_file_that_shrinks(self):
        """What check() could not know, blocks() sees."""
        with tempfile.TemporaryFile() as f:
            f.write(b'a\nb\n')
            f.flush()
            os.lseek(f.fileno(), 0, os.SEEK_SET)
            message = self.message(f.fileno())
            message.check()
            os.ftruncate(f.fileno(), 3)
            self.check(qr.PARTIAL_LINE,
                       lambda: b''.join(message.blocks()))

    def test_pipes(self):
        for data, want in ((b'a\n', b'a\n'), (b'', b''),
                           (b'a\nb', qr.PARTIAL_LINE)):
            reading, writing = os.pipe()
            os.write(writing, data)
            os.close(writing)
            self.check(want, self.whole, reading)
            os.close(reading)

    def test_a_silent_pipe(self):
        for data in b'', b'a\n':
            reading, writing = os.pipe()
            os.write(writing, data)
            self.clock.now = 1000
            self.check(qr.NO_MESSAGE, self.whole, reading)
            self.assertEqual(1007, self.clock.now)
            os.close(reading)
            os.close(writing)

    def test_unreadable(self):
        self.check(qr.NO_MESSAGE, lambda: self.message(None).check())
        fd = os.open(tempfile.gettempdir(), os.O_RDONLY)
        self.check(qr.NO_MESSAGE, self.whole, fd)
        os.close(fd)
        with tempfile.NamedTemporaryFile() as f:
            fd = os.open(f.name, os.O_WRONLY)       # reading is an error
            os.write(fd, b'a\n')
            os.lseek(fd, 0, os.SEEK_SET)
            self.check(qr.NO_MESSAGE, self.whole, fd)
            os.close(fd)

    def test_null(self):
        fd = os.open(os.devnull, os.O_RDONLY)
        self.check(b'', self.whole, fd)
        os.close(fd)

    def test_a_deadline_for_each_piece(self):
        """Drips of any size must make up 64 KiB in time; how long the whole
        takes is no matter."""
        piece = qr.SEND_PIECE
        for size, seconds, count, want in (
                (piece, 5, 4, 4 * piece), (piece // 2, 3, 8, 4 * piece),
                (piece // 2, 4, 8, qr.NO_MESSAGE),
                (1, 1, 20, qr.NO_MESSAGE), (piece, 8, 2, qr.NO_MESSAGE)):
            reading, writing = os.pipe()
            self.clock.now, left = 1000, [count]

            def wait(_, __, deadline):
                self.clock.now += seconds
                if self.clock.now > deadline:
                    raise qr.TimedOut()
                if left[0] > 0:
                    os.write(writing, b'\n' * size)
                elif not left[0]:
                    os.close(writing)
                left[0] -= 1
            message = qr.Message(reading, wait=wait, clock=self.clock,
                                 seconds=7)
            self.check(want, lambda: len(b''.join(message.blocks())))
            os.close(reading)
            if left[0] >= 0:
                os.close(writing)

    def test_woken_for_nothing(self):
        """A pipe that does not block, and is empty after all."""
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        waits = []

        def wait(*_):
            waits.append(1)
            if len(waits) == 3:
                os.write(writing, b'a\n')
                os.close(writing)
        message = qr.Message(reading, wait=wait, clock=self.clock, seconds=7)
        self.check(b'a\n', lambda: b''.join(message.blocks()))
        os.close(reading)


# SMTP

class ReplyGrammar(Tables):

    LENIENT = False

    def read(self, *pieces):
        """(code, text, the bytes left over) once there is a reply."""
        reader = qr.ReplyReader(self.LENIENT)
        for number, piece in enumerate(pieces):
            used = reader.take(piece)
            if used is not None:
                reply = reader.reply()
                return reply.code, reply.text, \
                    piece[used:] + b''.join(pieces[number + 1:])
        return None

    REPLIES = (
        (b'250 ok\r\n', (250, b'250 ok\n', b'')),
        (b'250 ok\n', (250, b'250 ok\n', b'')),
        (b'250 ok\r\r\n', (250, b'250 ok\n', b'')),
        (b'250\r\n', (250, b'250\n', b'')),
        (b'250\n', (250, b'250\n', b'')),
        (b'250 \r\n', (250, b'250 \n', b'')),
        (b'250  two  blanks \n', (250, b'250  two  blanks \n', b'')),
        (b'250\tok\r\n', (250, b'250\tok\n', b'')),
        (b'250-a\n250\tb\n', (250, b'250-a\n250\tb\n', b'')),
        (b'250-a\r\n250-b\r\n250 c\r\n',
         (250, b'250-a\n250-b\n250 c\n', b'')),
        (b'250-a\n250\n', (250, b'250-a\n250\n', b'')),
        (b'250-\n250 \n', (250, b'250-\n250 \n', b'')),
        # codes of one class: the last one counts
        (b'250-a\n251 b\n', (251, b'250-a\n251 b\n', b'')),
        (b'550-a\n530 b\n', (530, b'550-a\n530 b\n', b'')),
        # two replies at once
        (b'250 a\r\n354 b\r\n', (250, b'250 a\n', b'354 b\r\n')),
        (b'250 a\nnonsense', (250, b'250 a\n', b'nonsense')),
        # any bytes in the text
        (b'250 a\0b\xff\n', (250, b'250 a\0b\xff\n', b'')),
        (b'250 a\rb\n', (250, b'250 ab\n', b'')),
        (b'250 250-a\n', (250, b'250 250-a\n', b'')),
        # not yet
        (b'', None), (b'2', None), (b'25', None), (b'250', None),
        (b'250 ok', None), (b'250 ok\r', None), (b'250-a\r\n', None),
        (b'250-a\r\n2', None), (b'250-a\r\n250', None))

    REFUSED = (
        b'\n', b'\r\n', b' \n', b'25\n', b'2\r\n', b'25 ok\n', b'2500 ok\n',
        b'250x\n', b'250_\n', b'250:ok\n', b'250\0\n',
        b'250\rok\n', b' 250 ok\n', b'+250 ok\n', b'-50 ok\n', b'2 0 ok\n',
        b'ok\n', b'EHLO x\r\n', b'SSH-2.0-x\r\n', b'HTTP/1.1 400\r\n',
        b'\x16\x03\x01', b'\0\n', '２50 ok\n'.encode(), b'\xb250 ok\n',
        b'25\r\n0 ok\n', b'150 ok\n', b'650 ok\n', b'000 ok\n', b'999\n',
        # continuation lines of another class, or of none
        b'250-a\n550 b\n', b'550-a\n250 b\n', b'250-a\n450-b\n450 c\n',
        b'250-a\nb\n', b'250-a\n\n', b'250-a\n 250 b\n', b'250-a\n25\n',
        # refused before the line has come to its end
        b'x', b'1', b'6', b'2x', b'25x', b'250x', b'250-a\n5')

    def test_grammar(self):
        for data, want in self.REPLIES:
            self.check(want, self.read, data)
        for data in self.REFUSED:
            self.check(qr.ConnectionLost, self.read, data)

    def test_split_anywhere(self):
        """Pieces of any size make no difference."""
        for data, want in self.REPLIES:
            for at in range(len(data) + 1):
                self.check(want, self.read, data[:at], data[at:])
            self.check(want, self.read, *[data[at:at + 1]
                                          for at in range(len(data))])
        for data in self.REFUSED:
            for at in range(len(data) + 1):
                self.check(qr.ConnectionLost, self.read, data[:at], data[at:])

    def test_every_code(self):
        """200 to 599, and no other."""
        for code in range(1000):
            for form in b'%03d\r\n', b'%03d ok\n', b'%03d-x\n%03d y\n':
                data = form.replace(b'%03d', b'%03d' % code)
                try:
                    got = self.read(data)[0]
                except qr.ConnectionLost:
                    got = None
                if got != (code if 200 <= code < 600 else None):
                    self.fail('%r: %r' % (data, got))

    def test_kind(self):
        for code in 200, 299, 354, 421, 599:
            self.check(code // 100, qr.Reply(code, b'').kind)

    def test_permanent(self):
        """5xx, but not 530: that is about our configuration."""
        for code, want in ((250, False), (421, False), (452, False),
                           (500, True), (530, False), (550, True),
                           (599, True)):
            self.check(want, qr.permanent, qr.Reply(code, b''))

    def test_size(self):
        """A reply may have so many bytes, its lines together, and no more,
        however it comes in; another one behind it does not count."""
        most = qr.REPLY_SIZE_MAX
        line, end = b'250-xxxx\r\n', b'250 ' + b'x' * 9
        lines = line * ((most - 100) // len(line))
        for data in (end + b'x' * (most - len(end) - 1) + b'\n',
                     lines + end + b'x' * (most - len(lines) - len(end) - 1)
                     + b'\n'):
            self.assertEqual(most, len(data))
            blocks = [data[at:at + 65536] for at in range(0, most, 65536)]
            for reader, pieces in ((qr.ReplyReader(), [data + data]),
                                   (qr.ReplyReader(True), blocks)):
                for piece in pieces:
                    used = reader.take(piece)
                self.assertEqual(min(len(piece), most), used)
                self.assertEqual(250, reader.reply().code)
                self.assertLessEqual(len(reader.reply().text),
                                     2 * qr.REPLY_KEPT)
            longer = data[:-1] + b'x\n'
            self.check(qr.ConnectionLost, self.read, longer)
            self.check(qr.ConnectionLost, self.read,
                       *blocks[:-1] + [longer[-65537:]])

    def test_memory(self):
        tracemalloc.start()
        try:
            for block in b'250-xxxx\r\n' * 5000, b'250' + b'x' * 65536:
                reader = qr.ReplyReader(True)
                with self.assertRaises(qr.ConnectionLost):
                    while True:
                        reader.take(block if reader.size else b'250-a\n')
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        self.assertLess(most, 1000000)


class LenientGrammar(ReplyGrammar):
    """The same for the reply to the end of the data: a line without a code
    is passed over, if one with a code has come before."""

    LENIENT = True
    REPLIES = ReplyGrammar.REPLIES + (
        (b'250-accepted\r\nfor delivery\r\n250 done\r\n',
         (250, b'250-accepted\nfor delivery\n250 done\n', b'')),
        (b'250-a\n\n\r\n250 b\n', (250, b'250-a\n\n\n250 b\n', b'')),
        (b'250-a\n 250 b\n250 c\n', (250, b'250-a\n 250 b\n250 c\n', b'')),
        (b'250-a\n2500 bytes\n55\n5\n250x\n250_\n199 x\n600 x\n251\n421 x\n',
         (251, b'250-a\n2500 bytes\n55\n5\n250x\n250_\n199 x\n600 x\n251\n',
          b'421 x\n')),
        (b'550-a\nb\n550\tc\n', (550, b'550-a\nb\n550\tc\n', b'')),
        # not yet
        (b'250-a\nb\n', None), (b'250-a\n\n', None), (b'250-a\n25\n', None),
        (b'250-a\n5', None), (b'250-a\n550 b', None),
        (b'250-a\nb\n250-c\n', None))
    REFUSED = tuple(data for data in ReplyGrammar.REFUSED
                    if not data.startswith(b'250-a')) + (
        b'250-a\n550 b\n', b'250-a\nb\n550 c\n', b'550-a\nb\n250 c\n',
        b'250-a\n550-b\n', b'250-a\n450-b\n450 c\n', b'250-a\n354\n')


class SmtpTables(Tables):

    def test_parse_ehlo(self):
        def offered(*lines):
            text = b''.join(b'250%c%s\n' % (b'-' if line != lines[-1] else
                                            b' ', line) for line in lines)
            return {name: sorted(set(words)) for name, words in
                    qr.parse_ehlo(text).items()}
        for lines, want in (
                ((b'fake',), {}), ((b'PIPELINING',), {}),
                ((b'fake', b'PIPELINING'), {b'PIPELINING': []}),
                ((b'fake', b'Size 1000', b'8bitmime'),
                 {b'SIZE': [b'1000'], b'8BITMIME': []}),
                ((b'fake', b'SIZE'), {b'SIZE': []}),
                ((b'fake', b'auth plain Login'),
                 {b'AUTH': [b'LOGIN', b'PLAIN']}),
                ((b'fake', b'AUTH=LOGIN'), {b'AUTH': [b'LOGIN']}),
                ((b'fake', b'AUTH PLAIN', b'AUTH=LOGIN', b'AUTH CRAM-MD5'),
                 {b'AUTH': [b'CRAM-MD5', b'LOGIN', b'PLAIN']}),
                ((b'fake', b'AUTH'), {b'AUTH': []}),
                ((b'fake', b'AUTHX PLAIN', b'XAUTH LOGIN'),
                 {b'AUTHX': [b'PLAIN'], b'XAUTH': [b'LOGIN']}),
                ((b'fake', b'  AUTH   PLAIN  '), {b'AUTH': [b'PLAIN']}),
                ((b'fake', b'AUTH PLAINTEXT'), {b'AUTH': [b'PLAINTEXT']}),
                ((b'fake', b'', b'DSN'), {b'DSN': []}),
                ((b'fake', b'\xff\0'), {b'\xff\0': []})):
            self.check(want, offered, *lines)
        self.check({}, qr.parse_ehlo, b'')
        self.check({}, qr.parse_ehlo, b'250\n')
        self.check({}, qr.parse_ehlo, b'250-\n250-\n250\n')

    def test_mask(self):
        long = b'correct horse battery'
        for text, secrets, want in (
                (b'535 no', [], b'535 no'),
                (b'535 no', [b'secret'], b'535 no'),
                (b'535 not secret!', [b'secret'], b'535 not ***!'),
                (b'secretsecret', [b'secret'], b'***'),
                (b'500 ' + long[:11], [long], b'500 ' + long[:11]),
                (b'user:pass', [b'user', b'pass'], b'***:***'),
                # one holds the other, two overlap, one overlaps itself
                (b'a passport', [b'pass', b'passport'], b'a ***'),
                (b'a passportal', [b'passport', b'portal'], b'a ***'),
                (b'aXaXa', [b'aXa'], b'***'),
                (b'abc', [b''], b'abc'), (b'abc', [b'b'], b'a***c')):
            self.check(want, redactor(secrets).hide, text)
        # A name is masked as a whole.
        hide = redactor([b'password'], b'me@example.com').hide
        self.check(b'*** at x@example.com', hide,
                   b'me@example.com at x@example.com')
        self.check(b'me@example.com', hide, b'me@example.com', False)
        # A reply is kept up to a number of bytes; a secret that the end of
        # it cut in half does not show.
        text, hide = b'y' * (qr.REPLY_KEPT - 5) + b'sesam', redactor(
            [b'sesame']).hide
        self.check(text[:-6], hide, text)
        self.check(text, qr.Redactor().hide, text)
        self.check(text[1:], hide, text[1:])

    def test_masks_end(self):
        """Secrets that look like the mask, or like each other."""
        for secrets in ([b'*'], [b'***'], [b'*', b'**', b'***'],
                        [b'*' * 8], [b'*' * 20, b'*' * 8], [b'a', b'*'],
                        [b'5', b'3', b'0', b' '], [b'aaaaaaaa' * 9]):
            for text in (b'*' * 50, b'a' * 700 + b'\n', b'535 no *** a\n'):
                masked = redactor(secrets).hide(text)
                for secret in secrets:
                    if b'*' not in secret:
                        self.assertNotIn(secret, masked)

    def test_mask_lines(self):
        """In a reply to AUTH a line goes that has four bytes in a row."""
        long = b'correct horse'
        for text, secrets, want in (
                (b'535 no\n', [], b'535 no\n'),
                (b'535 5.7.8 no\n', [long], b'535 5.7.8 no\n'),
                (b'535 is it correct horse?\n', [long], b'535 ***\n'),
                (b'501-what is corre\n501-ct horse\n501 no\n', [long],
                 b'501-***\n501-***\n501 no\n'),
                # four bytes and three; the first and the last four
                (b'535 xrrecx\n', [long], b'535 ***\n'),
                (b'535 xrrex\n', [long], b'535 xrrex\n'),
                (b'535 corr', [long], b'535 ***'),
                (b'535 orse', [long], b'535 ***'),
                # short secrets
                (b'535 abcd\n', [b'bcd'], b'535 ***\n'),
                (b'535 abc\n', [b'bcd'], b'535 abc\n'),
                (b'535-abc\n535 def\n', [b'e'], b'535-abc\n535 ***\n'),
                (b'535 no\n', [b''], b'535 no\n'),
                # the code stays, and is not looked at
                (b'535\n', [b'535', b'5'], b'535\n'),
                (b'535 no\n', [b'535 '], b'535 no\n'),
                (b'535-ok\n535 deff\n', [b'abcdef', b'xdeff'],
                 b'535-ok\n535 ***\n')):
            self.check(qr.Reply(535, want), redactor(secrets).auth_reply,
                       qr.Reply(535, text))

    def test_no_secret_is_shown(self):
        """Whatever part of a command a server sends back to AUTH."""
        user, password = b'user@example.com', b'pa|ss: w\xc3\xb6rd'
        all_forms = qr.Redactor((user, password))
        for form in [password] + [
                binascii.b2a_base64(value).rstrip() for value in (
                    user, password, b'\0' + user + b'\0' + password)]:
            self.assertIn(form, all_forms.secrets)
            for size in (4, 5, 8, len(form)):
                for at in range(len(form) - size + 1):
                    echo = form[at:at + size]
                    self.check(
                        qr.Reply(535, b'535-5.7.8 bad\n535 ***\n'),
                        all_forms.auth_reply, qr.Reply(
                            535, b'535-5.7.8 bad\n535 AUTH: ' + echo +
                            b'!\n'))
        self.check(b'x', qr.Redactor().hide, b'x')

    def test_said(self):
        def length(text):
            return len(qr.reply_text(qr.Reply(550, text), qr.Redactor()))
        for text, want in (
                (b'550 no\n', b'Remote host said: 550 no\n'),
                (b'550-no\n550 way\n', b'Remote host said: 550-no\n'
                 b'550 way\n'),
                (b'550\n', b'Remote host said: 550\n')):
            self.check(want, qr.reply_text, qr.Reply(550, text),
                       qr.Redactor())
        head = len(b'Remote host said: ')
        self.check(head + 4999, length, b'5' * 4998 + b'\n')
        for size in 5000, 5001, 16384, 20000:
            got = length(b'5' * size + b'\n')
            self.assertLessEqual(abs(got - head - 5000), 1)
        self.check(head + 4999, length, b'5' * 4998 + b'\n' * 9)

    def test_about_security(self):
        for text, want in (
                (b'550 5.7.3 STARTTLS is required\n', True),
                (b'550 4.7.0\n', True), (b'550-no\n550 5.7.26 no\n', True),
                (b'550 #5.7.1 no\n', True),
                (b'550-5.7.1 no\n550 way\n', True),
                (b'554 no (#5.7.1)\n', True),
                (b'554 5.7.1: no\n', True), (b'550 <x>, 5.7.1.\n', True),
                (b'550 5.1.1 no\n', False), (b'550 no\n', False),
                (b'550\n', False), (b'550 2.7.1\n', False),
                (b'550 15.7.1 5.70.1 5.17.1 5.7 5.7.x 5.7.1.2 5..7.1\n',
                 False)):
            self.check(want, qr.about_security, qr.Reply(550, text))

    def test_first_words(self):
        def words(text):
            return qr.reply_summary(qr.Reply(550, text),
                                    redactor([b'secret']))
        for text, want in ((b'550 no \n', b'550 no'),
                           (b'550-no\n550 way\n', b'550-no'),
                           (b'550 no secret\n', b'550 no ***'),
                           (b'550 ' + b'x' * 999 + b'\n',
                            b'550 ' + b'x' * 196)):
            self.check(want, words, text)

    def test_base64(self):
        for data, text in ((b'', b''), (b'a', b'YQ=='), (b'ab', b'YWI='),
                           (b'abc', b'YWJj'), (b'\xff\xfe', b'//4='),
                           (b'\0' * 300, b'A' * 400)):
            self.check(text, qr.base64, data)
            self.check(data, qr.unbase64, text)
        self.check(b'ab', qr.unbase64, b' YWI= ')
        for text in (b'YQ', b'YQ=', b'YQ===', b'Y', b'=', b'Y Q==', b'YQ==x',
                     b'Y*Q==', b'YR==', b'YWJj\nYWJj', b'?', b'\xff\xff',
                     b'YQ==YQ=='):
            self.check(ValueError, self.value_error, text)

    @staticmethod
    def value_error(text):
        """unbase64(), with any kind of ValueError as plain one."""
        try:
            return qr.unbase64(text)
        except ValueError:
            raise ValueError

    def test_hmac_md5(self):
        """The example of RFC 2195."""
        try:
            hmac.new(b'', b'', 'md5')
        except ValueError:
            self.skipTest('no MD5 here')
        self.check(b'b913a602c7eda7a495b4e6e7334d3890', qr.hmac_md5,
                   b'tanstaaftanstaaf',
                   b'<1896.697170952@postoffice.reston.mci.net>')
        long = b'k' * 100
        self.check(hmac.new(long, b'x', 'md5').hexdigest().encode(),
                   qr.hmac_md5, long, b'x')

# Which server, and when to go on

class Trying(Tables):

    REFUSED = qr.SENDER_REJECTED + b'Remote host said: 5\n'

    def failures(self):
        """What can become of a server, by a word."""
        def failure(report, diagnostic, answered=False, reached=True):
            return qr.Result(report, try_next=True, reached=reached,
                             answered=answered, diagnostic=diagnostic)
        return {
            'unreached': failure(b'', b'connection timed out',
                                 reached=False),
            'no-TLSA': failure(b'ZTLSA\n', b'no TLSA', reached=False),
            'died': failure(b'Zdied\n', b'connection closed'),
            'greeting': failure(b'Zgreeting\n', b'greeting failed', True),
            'soft': failure(b'Zsender\n', b'soft', True),
            'hard': failure(b'Dsender\n', b'hard', True),
            'hard2': failure(b'Dsender2\n', b'hard2', True),
            'K': qr.Result(b'Kok\n', [b'r']),
            'D': qr.Result(b'Dgiving up\n', [b'hno\n'])}

    def attempt(self, *outcomes):
        """The report, and how many servers were tried."""
        known, tried = self.failures(), []

        def one(server):
            tried.append(server)
            return known[outcomes[int(server.address) - 1]]
        servers = [value_of(qr.Server, address=b'%d' % number, port=25)
                   for number in range(1, len(outcomes) + 1)]
        return qr.try_servers(servers, one).report, len(tried)

    def test_who_is_reported(self):
        """What becomes of the servers in turn: the first line of the report,
        and how many were tried.  The log of all attempts follows, but not if
        there was one server alone."""
        failures = self.failures()
        for text, want, tried in rows('''
                K                       Kok             1
                D                       Dgiving up      1
                unreached               NONE            1
                died                    Zdied           1
                greeting                Zgreeting       1
                soft                    Zsender         1
                hard                    Dsender         1
                K hard                  Kok             1
                hard K soft             Kok             2
                unreached died D        Dgiving up      3
                hard hard2              Dsender         2
                hard soft               Zsender         2
                soft hard               Zsender         2
                hard2 unreached         Dsender2        2
                unreached hard2         Dsender2        2
                no-TLSA hard            Dsender         2
                no-TLSA unreached       ZTLSA           2
                hard unreached soft     Zsender         3
                hard died               Zsender         2
                greeting hard           Zgreeting       2
                died greeting           Zgreeting       2
                unreached died          Zdied           2
                unreached unreached     NONE            2'''):
            outcomes, report = text.split(), want.encode() + b'\n'
            if want == 'NONE':
                report = qr.NO_CONNECTION
            if len(outcomes) > 1:
                report += b''.join(
                    b'%d: %s\n' % (number, failures[outcome].diagnostic)
                    for number, outcome in enumerate(outcomes, 1)
                    if number <= int(tried) and outcome not in 'KD')
            self.check((report, int(tried)), self.attempt, *outcomes)

    def test_recipients_are_kept(self):
        server = value_of(qr.Server, address=b'1', port=25, name=b'1')
        result = qr.try_servers([server],
                                lambda server: qr.Result(b'K', [b'r', b's']))
        self.assertEqual([b'r', b's'], result.recipients)

    def test_try_server(self):
        """What tcpto hears of a server, and what the trail says."""
        calls = []

        class TcpToNotes:
            def __init__(self, skipped):
                self.skipped = skipped

            def skip(self, address):
                return self.skipped

            def timed_out(self, address):
                calls.append('timed out')

            def answered(self, address):
                calls.append('answered')

        left, right = socket.socketpair()
        left.setblocking(False)
        right.send(b'554 no service\r\n')
        for title, skipped, outcome, note, heard in (
                ('skipped', True, None,
                 b'timed out before, not tried (qmail-tcpto)', []),
                ('timed out', False, qr.TimedOut(),
                 b'connection timed out', ['timed out']),
                ('refused', False, OSError(errno.ECONNREFUSED, ''),
                 b'connection refused', ['answered']),
                ('no way', False, OSError(errno.ENETUNREACH, ''),
                 b'network is unreachable', ['answered']),
                ('connected', False, left,
                 b'greeting failed: 554 no service', ['answered'])):
            with self.subTest(title):
                del calls[:]

                def connect(address, port, seconds):
                    self.assertEqual((b'192.0.2.1', 26, 5),
                                     (address, port, seconds))
                    if isinstance(outcome, Exception):
                        raise outcome
                    return outcome
                result = qr.ServerTry(
                    qr.Server(b'192.0.2.1', 26, b'h', qr.NO_TLSA, []),
                    value_of(qr.Route),
                    value_of(qr.Envelope, sender=b'', recipients=[b'a']),
                    control_files(), context_of(
                        tcpto=TcpToNotes(skipped),
                        connect=connect, connection=qr.Connection,
                        tls_control=lambda name: qr.TlsControl(
                            None, False, None, b''))).run()
                self.assertEqual((note, heard, title == 'connected', True),
                                 (result.diagnostic, calls, result.reached,
                                  result.try_next))
        self.assertEqual(b'QUIT\r\n', right.recv(99))
        right.close()

    def test_a_second_connection_that_fails(self):
        """A server whose TLS has failed was reached, whatever follows."""
        calls = []
        with FakeSMTP(ASK + 'S: 454 not now\nQ:') as server:
            def connect(address, port, seconds):
                calls.append(address)
                if len(calls) == 2:
                    raise OSError(errno.ECONNREFUSED, '')
                return qr.connect(b'127.0.0.1', server.port, seconds)
            result = qr.ServerTry(
                qr.Server(b'192.0.2.1', 25, b'h', qr.NO_TLSA, []),
                value_of(qr.Route),
                value_of(qr.Envelope, sender=b'', recipients=[b'a']),
                control_files(), context_of(
                    tcpto=qr.TcpTo(b'/nonexistent', time.time, 1, qr.wait),
                    connect=connect, connection=qr.Connection,
                    tls_control=lambda name: qr.TlsControl(
                        None, False, None, b''))).run()
        self.assertEqual((2, True), (len(calls), result.reached))

    def test_before_anybody_is_called(self):
        """What is known in advance: no server is asked for it."""
        class Partial:
            def check(self):
                raise qr.LocalFault(qr.PARTIAL_LINE)

        def never(*args):
            raise AssertionError('called')

        def deliver(host, sender, *recipients):
            return qr.output_of(qr.deliver(
                host, sender, list(recipients), control_files(),
                context_of(resolver=Zone({'h A': ['192.0.2.1']}),
                         is_own=lambda address: False, tcpto=None,
                         connect=never, message=Partial())))

        def output(*args):
            try:
                return deliver(*args)
            except qr.LocalFault as fault:
                return qr.output_of(qr.Result(fault.report))
        refused = qr.BAD_RECIPIENT + b'\0'
        for args, want in (
                ((b'h', b'a', b'b'), qr.PARTIAL_LINE + b'\0'),
                ((b'h', b'a b', b'b'), qr.BAD_SENDER + b'\0'),
                ((b'h', b'a\r\nDATA', b'b'), qr.BAD_SENDER + b'\0'),
                ((b'h', b'', b'b>'), refused + qr.NO_RECIPIENT + b'\0'),
                ((b'h', b'', b'\n', b''),
                 refused * 2 + qr.NO_RECIPIENT + b'\0'),
                ((b'h', b'', b'\n', b'b'), qr.PARTIAL_LINE + b'\0'),
                ((b'nowhere', b'', b'b'),
                 qr.NO_HOST % b'nowhere' + b'\0')):
            self.check(want, output, *args)


# The safety rules

class SafetyRules(Tables):
    """Section 2 of the program, rule by rule: each is kept in two places,
    and each place alone keeps it."""

    def dialogue(self):
        return qr.Dialogue(
            qr.Connection(Scripted(), VirtualClock().at_once,
                          VirtualClock()), 5, qr.Redactor(), qr.NO_TRACE)

    def transaction(self):
        return qr.Transaction(
            self.dialogue(),
            qr.SessionFacts(b'192.0.2.1', {}, False, b'', b'', b''),
            qr.Envelope(b's@x', [b'r@x']), None)

    def attempt(self, **context):
        context.setdefault('tls_control', lambda name: None)
        return qr.ServerTry(server_at(b'192.0.2.1', 25), value_of(qr.Route),
                            None, control_files(), context_of(**context))

    def session(self, relay=b'relay.example', level=qr.TlsPolicy.SYSTEM,
                port=587, failure=b'', encrypted=True):
        session = qr.Session(
            self.dialogue(), server_at(b'192.0.2.1', port),
            value_of(qr.Route, relay=relay, credentials=(b'u', b'p')),
            qr.TlsSetup(qr.TlsPolicy(level, None), None, None, failure),
            b'me')
        session.encrypted = encrypted
        return session

    def guard(self, **options):
        self.session(**options).guard_password()

    def test_rule_1(self):
        """A password only to a relay that a control file names."""
        senders = qr.parse_senders(b's@x|u|p')
        self.check(None, lambda: qr.choose_route(b'h', b's@x', control_files(
            authsenders=senders)).credentials)
        self.check((b'u', b'p'), lambda: qr.choose_route(
            b'h', b's@x', control_files(
                authsenders=senders,
                smtproutes=qr.parse_routes(b':r'))).credentials)
        self.check(None, self.guard)
        self.check(qr.NO_RESOURCES, lambda: self.guard(relay=None))

    def test_rule_2(self):
        """A password only over verified TLS, never after TLS has failed."""
        files = qr.TlsControl(None, False, None, b'')
        policy = qr.choose_tls(server_at(b'192.0.2.1', 2525), True, files)
        self.assertEqual(qr.TlsPolicy.SYSTEM, policy.level)
        unchecked = qr.choose_tls(server_at(b'192.0.2.1', 25), True, files)
        self.check(None, qr.last_policy, unchecked, qr.TlsFailed(b''), 25,
                   True)
        for options in (dict(encrypted=False),
                        dict(level=qr.TlsPolicy.IF_OFFERED),
                        dict(port=25, encrypted=False, failure=b'why')):
            self.check(qr.NO_RESOURCES, lambda: self.guard(**options))
        self.check(None, lambda: self.guard(port=25, encrypted=False))
        # Where TLS failed before, a server that offers none now is no better.
        session = self.session(port=25, level=qr.TlsPolicy.IF_OFFERED,
                               failure=b'why', encrypted=False)
        self.assertRaisesRegex(qr.TlsFailed, 'does not offer STARTTLS',
                               session.start_tls)

    def test_rule_3(self):
        """No end of the data before its time."""
        message = b'a\n.\nb\r.\r\n.\n'
        for at in range(len(message)):
            wire = b'\r\n' + b''.join(qr.wire_form([message[:at],
                                                    message[at:]]))
            self.assertNotIn(b'\r\n.\r\n', wire)
        end = b'a\r\n.\r\nb'
        for at in range(len(end)):
            transaction = self.transaction()

            def send():
                for part in end[:at], end[at:]:
                    transaction.guard_end_of_data(part)
            self.check(qr.NO_RESOURCES, send)
        self.check(qr.NO_RESOURCES, self.transaction().guard_end_of_data,
                   b'.\r\n')
        self.check(None, self.transaction().guard_end_of_data, b'..\r\n')

    def test_rule_4(self):
        """No byte of an address becomes a command."""
        for byte in b'\r', b'\n', b'\0':
            self.check(None, qr.envelope_address, b'a' + byte + b'@x')
            if byte != b'\n':
                self.check(qr.Invalid, qr.parse_helohost, b'a' + byte + b'b')
            dialogue = self.dialogue()
            self.check(qr.NO_RESOURCES, dialogue.send_pipelined,
                       [(qr.MAIL, b'MAIL FROM:<a' + byte + b'>')])
            self.assertEqual(b'', dialogue.connection.sock.data)

    def test_rule_5(self):
        """No mail by DNS to this host."""
        def find(is_own):
            zone = Zone({'h MX': [(5, 'a'), (9, 'b')], 'a A': ['192.0.2.1'],
                         'b A': ['192.0.2.2'], 'a AAAA': [], 'b AAAA': []})
            found = qr.find_servers(b'h', value_of(qr.Route), zone, is_own)
            return found.report or [server.address
                                    for server in found.servers]
        self.check([b'192.0.2.1'], find, lambda a: a == b'192.0.2.2')
        self.check(qr.OWN_ADDRESS, find, lambda a: a == b'192.0.2.1')
        result = self.attempt(is_own=lambda address: True).run()
        self.assertEqual((True, False), (result.try_next, result.reached))

    def test_rule_6(self):
        """From the last byte on the message is in doubt, whatever fails."""
        class Broken(qr.Trace):
            def progress(self, sent, size):
                raise qr.LocalFault(qr.KILLED)
        for step, in_doubt in ((qr.DATA, False), (qr.END, True)):
            transaction = self.transaction()
            transaction.message = qr.Message(0)
            transaction.dialogue.trace = Broken()
            self.check(qr.KILLED, transaction.send_block, b'x.\r\n', step)
            self.assertEqual(in_doubt, transaction.dialogue.in_doubt)

    def test_rule_7(self):
        """K only after a 2xx reply to the end of the data."""
        for code, letter in (b'250', b'K'), (b'554', b'D'):
            transaction = self.transaction()
            dialogue = transaction.dialogue
            dialogue.connection.sock.received = iter([code + b' x\r\n'])
            dialogue.advance(sent=qr.END, replied=qr.DATA)
            self.assertTrue(dialogue.in_doubt)
            result = transaction.end_of_data_reply()
            self.assertEqual((letter, False),
                             (result.report[:1], dialogue.in_doubt))
            self.attempt().confirm(result, dialogue)
            self.assertEqual(letter, result.report[:1])
        result = qr.Result(b'K')
        self.attempt().confirm(result, self.dialogue())
        self.assertEqual(qr.DIED_LATE % b'192.0.2.1', result.report)

    def test_rule_10(self):
        """Only names and addresses in paths."""
        for label in b'..', b'a/b', b'.', b'a\0':
            self.check(None, qr.host_text,
                       bytes((len(label),)) + label + b'\0')
        for name in b'../x', b'/x', b'.x', b'a/../x':
            self.check(qr.NO_CONTROL, qr.read_tls_control, name)

    def test_late_servers_without_resources(self):
        """Trouble of ours while the late ones are asked for: what the first
        ones have said counts."""
        def find():
            raise OSError(errno.EMFILE, '')
        server = server_at(b'192.0.2.1', 25)
        self.assertEqual([server], list(qr.late_ones([server], find)))

    # What keeps each rule: the text, and what is left without it.
    KEEPERS = [
        (1, '    if route.relay is None:\n        route = Route(',
         '    if False:\n        route = Route('),
        (1, 'self.route.relay is None or \\', 'False or \\'),
        (2, '    verify = password and must_verify(server)',
         '    verify = False'),
        (2, 'if policy.required or password or port', 'if policy.required or '
         'port'),
        (2, '(self.tls_failure and not self.encrypted) or', 'False or'),
        (2, '(unchecked or not self.encrypted)', 'False'),
        (3, "text.replace(b'\\n.', b'\\n..')", 'text'),
        (3, "b'.' if line_start and text.startswith(b'.') else b''", "b''"),
        (3, "(b'.' in block and end in block)", 'False'),
        (3, 'end in self.seam + block[:len(end)]', 'False'),
        (4, "    if b'\\r' in address or b'\\n' in address or", '    if'),
        (4, 'if not name or unsafe(name)', 'if not name'),
        (4, "if b'\\r' in line or b'\\n' in line or b'\\0' in line:",
         'if False:'),
        (5, 'if exchanger.preference < limit]', ']'),
        (5, 'if self.route.relay is None and self.context.is_own',
         'if False and self.context.is_own'),
        (7, '        if reply.code < 300:\n            self.dialogue.adv',
         '        if True:\n            self.dialogue.adv'),
        (7, "if result.report[:1] == b'K' and dialogue.replied < END",
         'if False'),
        (10, "c in b'abcdefghijklmnopqrstuvwxyz0123456789-_'", 'True'),
        (10, "if b'/' in name or name[:1] == b'.':", 'if False:')]

    def test_each_keeper_is_needed(self):
        """Without it the test of its rule fails."""
        with open(PROGRAM, encoding='utf-8') as f:
            program = f.read()

        def survives(keeper):
            rule, old, new = keeper
            assert program.count(old) == 1, old
            with tempfile.TemporaryDirectory() as place:
                for name, text in (
                        ('qmail_remote.py', program.replace(old, new)),
                        ('test_qmail_remote.py', None)):
                    path = os.path.join(place, name)
                    if text is None:
                        os.symlink(os.path.abspath(__file__), path)
                    else:
                        with open(path, 'w', encoding='utf-8') as f:
                            f.write(text)
                code = ('import sys; sys.path.insert(0, sys.argv[1]); '
                        'import unittest, test_qmail_remote as t; '
                        't.HERE = sys.argv[1]; '
                        'r = unittest.TestResult(); unittest.defaultTest'
                        'Loader.loadTestsFromName(sys.argv[2], t).run(r); '
                        'print(t.qr.__file__, len(r.failures) + '
                        'len(r.errors), r.testsRun)')
                done = subprocess.run(
                    [sys.executable, '-BS', '-c', code, place,
                     'SafetyRules.test_rule_%d' % rule],
                    stdout=subprocess.PIPE, timeout=60)
                file, failures, ran = done.stdout.split()
                assert file.startswith(os.fsencode(place)) and ran == b'1'
                return failures == b'0'
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            for keeper, alive in zip(self.KEEPERS,
                                     pool.map(survives, self.KEEPERS)):
                with self.subTest(keeper):
                    self.assertFalse(alive)


# ------------------------------------------------------------ Fuzzing
# Random servers, messages, DNS answers, control files and addresses, each
# made from a seed and a number alone, through the real code on a virtual
# clock.  Each case is held against what a small model knows to be true.
# `python3 test_qmail_remote.py fuzz` runs it for long; SECONDS and SEED, and
# KIND, COUNT and CASE (the number of one case) are environment variables.

FOREVER = float('inf')
HELO_NAME = b'me.example'
# X.7.x (RFC 3463) in the lines of a reply, in a script and in a report.
SECURITY = re.compile(r'(?m)^(?:S: |Remote host said: )?[45]\d\d[ -]'
                      r'.*(?<![\w.])[45]\.7\.\d+(?!\.?\w)')
SECURITY_BYTES = re.compile(SECURITY.pattern.encode())


class Violation(Exception):
    """What must never happen has happened."""


# Things to choose from

CODES = (200, 211, 220, 221, 235, 250, 251, 299, 300, 334, 354, 399, 400,
         421, 432, 450, 451, 452, 454, 499, 500, 501, 502, 503, 504, 530,
         534, 535, 538, 550, 552, 554, 599)
REFUSALS = (421, 450, 451, 452, 499, 500, 503, 530, 550, 552, 554, 599)
GARBAGE = (
    b'', b'hello', b'25', b'2500 ok', b'250_ok', b' 250 ok', b'+25 ok',
    b'2x0 ok', b'\0\0\0', b'100 wait', b'199', b'000', b'600 ok', b'999',
    b'250-ok\r\n550 no', b'550-no\r\n250 ok', b'450-no\r\n550 no',
    b'250-ok\r\nwhat', b'250-ok\r\n', b'\xff\xfe\r\n', b'\r\r\n',
    b'\xd9\xa2\xd9\xa5\xd9\xa0', b'-250 ok', b'25 0', b'\t250 ok',
    b'220\0 ok', b'3', b'354-\r\n250 ok', b'x' * 3000, b'550' * 2000)
WORDS = (b'', b' ', b' ok', b' 2.1.5 ok', b' 5.7.1 no', b' no (#5.7.26)',
         b' 4.7.0 later', b' 5.1.1 no', b' \0\0', b' no\xe9', b' a\rb',
         b' 550 no', b' 250 ok', b'\r', b' ' + b'long ' * 40)
EXTENSIONS = ((b'PIPELINING', .6), (b'CHUNKING', .5), (b'SIZE', .3),
              (b'SIZE 1000', .2), (b'8BITMIME', .4), (b'SMTPUTF8', .4),
              (b'smtputf8', .1), (b'STARTTLS', .06), (b'HELP', .1),
              (b'DSN', .1), (b'', .05), (b'X ' + b'y' * 500, .02),
              (b'\xff\0', .02), (b'Pipelining', .1))
METHODS = (b'PLAIN', b'LOGIN', b'CRAM-MD5', b'plain', b'XOAUTH2', b'PLAINX')

# Addresses as given, and as they go out; None: never.
SENDERS = (
    (b's@here.example', b's@here.example'), (b'', b''),
    (b'a b@here.example', b'"a b"@here.example'),
    (b'no-at-sign', b'no-at-sign'), (b's\xc3\xa9@here.example',) * 2)
RECIPIENTS_SENT = (
    (b'one@there.example', b'one@there.example'),
    (b'two@there.example', b'two@there.example'),
    (b'a"b\\@there.example', b'"a\\"b\\\\"@there.example'),
    (b'x>DATA@there.example', b'"x>DATA"@there.example'),
    (b'@there.example', b'""@there.example'),
    (b'no-at-sign', b'no-at-sign'))
RECIPIENTS_8BIT = (
    (b'm\xc3\xbc@there.example',) * 2, (b'a@\xc3\xa9.example',) * 2,
    (b'bad\xff@there.example',) * 2)
RECIPIENTS_NEVER = (
    (b'a\r\nDATA@there.example', None), (b'a@b c', None), (b'\n', None),
    (b'a@b>\r', None), (b'a\rb@there.example', None), (b'', None))

LINES = (b'', b'.', b'..', b'a', b'.a', b'a.', b'Subject: x', b'\xc3\xa9',
         b'QUIT', b'RCPT TO:<evil@there.example>', b'.\r', b'\r.', b'\r',
         b'a\rb', b'\r\r', b'a\r.\rb', b'\0', b'x' * 998)


def random_message(chance):
    """A message, mostly short, seldom without a newline at its end."""
    count = chance.choice((0, 1, 2, 3, 5, 8, 30))
    lines = [chance.choice(LINES) for _ in range(count)]
    ends = b'\n' if chance.random() < .8 else b'\r\n'
    data = b''.join(line + ends for line in lines)
    size = chance.random()
    if size < .01:
        data = (data or b'.\n') * (chance.randrange(30000, 300000) //
                                   (len(data) or 2))
        data = data[:chance.randrange(len(data))] + b'\n'
    if size > .96:
        data += chance.choice((b'x', b'.', b'\r', b'a\r'))
    return data


def cut_at_random(chance, data, most=4):
    """data in up to most pieces; some may be empty."""
    cuts = sorted(chance.randrange(len(data) + 1)
                  for _ in range(chance.randrange(most)))
    return [data[start:end] for start, end in
            zip([0] + cuts, cuts + [len(data)])]


# A scripted server, and the socket to it

COMMANDS = re.compile(
    br'(EHLO|HELO) me\.example|STARTTLS|DATA|QUIT|'
    br'AUTH (LOGIN|CRAM-MD5|PLAIN( [A-Za-z0-9+/]+={0,2})?)|'
    br'MAIL FROM:<([^\r\n\0]*)>( SIZE=\d+)?( BODY=8BITMIME)?( SMTPUTF8)?|'
    br'RCPT TO:<([^\r\n\0]*)>')
ANSWER = re.compile(br'[A-Za-z0-9+/]*={0,2}|\*')


class FuzzSocket:
    """The client's socket.  coming: [when, bytes]; b'' is the end, None a
    reset.  opens: when it takes bytes again; narrow: the most that it takes
    at once, or 0; broken: when sending begins to fail."""

    def __init__(self, case):
        self.case, self.chance = case, case.chance
        self.coming, self.last = collections.deque(), case.now
        self.opens, self.broken = case.now, FOREVER
        self.narrow = self.chance.choice((0, 0, 0, 0, 1, 7, 50, 3000))
        self.server, self.closed, self.sent = None, False, bytearray()
        self.stalled = self.pushed = self.received = 0

    def setblocking(self, flag):
        pass

    def close(self):
        self.closed = True
        if self.server.has_been_taken() and self.chance.random() < .05:
            raise OSError(errno.EIO, 'no')

    def readable_at(self):
        return self.coming[0][0] if self.coming else FOREVER

    def writable_at(self):
        return min(self.opens, self.broken)

    def recv(self, size):
        self.case.step()
        if self.readable_at() > self.case.now:
            raise BlockingIOError()
        data = self.coming[0][1]
        if data is None:
            raise ConnectionResetError(errno.ECONNRESET, 'reset')
        if not data:
            return b''
        self.coming.popleft()
        if len(data) > size:
            self.coming.appendleft([self.case.now, data[size:]])
        self.received += len(data[:size])
        return data[:size]

    def send(self, data):
        self.case.step()
        if self.closed:
            raise OSError(errno.EBADF, 'closed')
        if self.server.has_been_taken() and self.chance.random() < .05:
            raise self.chance.choice((MemoryError, ValueError, qr.TimedOut))
        if self.case.now >= self.broken:
            raise BrokenPipeError(errno.EPIPE, 'broken pipe')
        if self.case.now < self.opens:
            raise BlockingIOError()
        size = len(data)
        if self.narrow:
            size = self.chance.randrange(1, max(self.narrow, size // 40) + 1)
            if self.chance.random() < .3:
                self.stall(self.chance.choice((0, 0, .01, .1)))
        data = bytes(data[:size])
        self.sent += data
        self.server.take(data)
        return len(data)

    def stall(self, rounds):
        """Takes nothing for so many timeouts; a little, if for none."""
        self.stalled += rounds
        self.server.slow = self.server.slow or self.stalled > .7
        self.opens = self.case.now + (rounds * self.case.seconds or 1e-9)

    # The other end

    def push(self, data, delay):
        """Lets data come in, by pieces, from that many seconds on."""
        self.last = max(self.last, self.case.now + delay)
        self.pushed += len(data)
        for piece in cut_at_random(self.chance, data, 3) \
                if self.chance.random() < .2 else (data,):
            if piece:
                self.coming.append([self.last, piece])
                if delay:
                    self.last += delay * self.chance.random()

    def end(self):
        self.coming.append([self.last, b''])
        self.broken = self.last + self.chance.choice((0, 1, FOREVER))

    def reset(self, drop):
        if drop:
            self.coming.clear()
            self.last = self.case.now
        self.coming.append([self.last, None])
        self.broken = self.last


class FuzzServer:
    """A small SMTP server that refuses and errs as chance has it, and knows
    the truth: what it got, and what it said to what.

    logged_in: it has taken a password; stray: it has said something besides
    one reply to each command, so that a client cannot know which is which;
    clean: all replies so far could be understood; slow: one of them may
    have come too late; mail, end: the codes said to MAIL and to the message,
    or None; recipients: [path, code]; complete: the whole message is in, for
    somebody; taken_at: how many bytes it has sent when 2xx to that is among
    them, or None."""

    def __init__(self, case, sock, index):
        self.case, self.chance, self.sock = case, case.chance, sock
        self.index, self.alive, self.mute = index, True, False
        self.fault = self.chance.choice((0, 0, 0, .02, .05, .2))
        self.refuse = self.chance.choice((0, 0, 0, .05, .2, .6))
        self.pace = self.chance.choice((0, 0, 0, .001, .01, .1))
        self.buffer, self.read = b'', self.read_command
        self.stray, self.clean, self.slow = False, True, False
        self.mail = self.end = self.data_code = self.auth = None
        self.recipients, self.body = [], bytearray()
        self.complete = self.early = self.ahead = self.logged_in = False
        self.end_at = self.said_5xx = self.taken_at = None
        self.offers_tls, self.over_tls = False, None
        sock.server = self
        if case.port == 465 and case.tls_wanted:
            self.read = self.read_tls
        else:
            self.answer(220, refused=(421, 450, 554, 250))

    # What it says

    def log(self, mark, data):
        self.case.log.append((self.case.now, self.index, mark, data))

    def say(self, data, delay=None):
        """Sends a reply; delay is in timeouts."""
        if self.mute or not self.alive:
            return
        if delay is None:
            delay = self.pace * self.chance.random()
        delay *= self.case.seconds
        if self.sock.last + delay > self.case.now + self.case.seconds / 9:
            self.slow = True
        self.log('S', data)
        self.sock.push(data, delay)

    def spoken(self, code, lines=None):
        """A reply in one of the forms that the grammar has."""
        ends = self.chance.choice((b'\r\n', b'\r\n', b'\r\n', b'\n'))
        if lines is None:
            count = self.chance.choice((1, 1, 1, 1, 1, 2, 5))
            lines = [self.chance.choice(WORDS) for _ in range(count)]
        if 500 <= code != 530:
            self.said_5xx = True
        return b''.join(
            b'%d-%s%s' % (code, line[1:], ends) for line in lines[:-1]
        ) + b'%d%s%s' % (code, lines[-1], ends)

    def answer(self, code, line=b'', lines=None, refused=REFUSALS):
        """Says code, or a refusal, or something else, as chance has it; the
        code that a client must understand, or None."""
        if not self.alive or self.mute:
            self.clean = False
            return None
        if self.chance.random() < self.refuse / 2:
            code, lines = self.chance.choice(refused), None
        if self.chance.random() < self.fault:
            return self.chance.choice(self.FAULTS)(self, code, line)
        self.say(self.spoken(code, lines))
        return code

    def wrong(self, code, line):
        code = self.chance.choice(CODES)
        self.say(self.spoken(code))
        return code

    def garbage(self, code, line):
        """After garbage nothing can be understood any more."""
        data = self.chance.choice(GARBAGE) + b'\r\n'
        if b'5' in data:
            self.said_5xx = True
        self.say(data)
        self.clean = False
        self.mute = data.endswith(b'-ok\r\n\r\n')
        return None

    def silent(self, code, line):
        self.mute, self.clean = True, False
        return None

    def leave(self, code=None, line=b''):
        self.log('S', '(closes)')
        self.alive = False
        self.sock.end()
        if code is not None:
            self.clean = False
        return None

    def break_off(self, code, line):
        self.log('S', '(resets)')
        self.alive = self.clean = False
        self.sock.reset(self.chance.random() < .5)
        return None

    def answer_and_leave(self, code, line):
        self.say(self.spoken(code))
        self.leave()
        return code

    def answer_and_break_off(self, code, line):
        self.say(self.spoken(code))
        self.log('S', '(resets)')
        self.alive = False
        self.sock.reset(False)
        return code

    def goodbye(self, code, line):
        return self.answer_and_leave(421, line)

    def twice(self, code, line):
        self.stray = True
        self.say(self.spoken(code))
        self.say(self.spoken(self.chance.choice(CODES + (code,) * 20)),
                 self.chance.choice((0, 0, .01, .5)))
        return code

    def late(self, code, line):
        self.slow = True
        self.say(self.spoken(code),
                 self.chance.choice((.5, .9, .99, 1, 1.01, 2)))
        return code

    def half(self, code, line):
        data = self.spoken(code)
        self.say(data[:self.chance.randrange(len(data))])
        self.clean, self.mute = False, True
        if self.chance.random() < .5:
            self.leave()
        return None

    def at_length(self, code, line):
        data = self.spoken(code, [b' ' + b'x' * self.chance.choice(
            (10, 600, 20000))] * self.chance.choice((1, 2, 100)))
        self.say(data)
        if len(data) > qr.REPLY_SIZE_MAX:       # as good as garbage
            self.clean = False
            return None
        return code

    def echo(self, code, line):
        cut = self.chance.choice((len(line), self.chance.randrange(99)))
        words = b' unrecognized: ' + line[:cut].replace(b'\n', b'')
        self.say(self.spoken(code, [b' -'] * self.chance.randrange(3) +
                             [words]))
        return code

    def echo_refusing(self, code, line):
        return self.echo(self.chance.choice(REFUSALS), line)

    def drip(self, code, line):
        self.slow, data = True, self.spoken(code)
        for at in range(len(data)):
            self.say(data[at:at + 1], self.chance.choice((.01, .1, .3)))
        return code

    def stall(self, code, line):
        self.slow = True
        self.sock.stall(self.chance.choice((.1, .9, 1, 5, FOREVER)))
        self.say(self.spoken(code))
        return code

    FAULTS = (wrong, wrong, wrong, garbage, garbage, silent, leave,
              break_off, answer_and_leave, answer_and_break_off, goodbye,
              twice, twice, late, half, at_length, echo, echo_refusing,
              drip, stall)

    # What it reads

    def take(self, data):
        """Some bytes of the client's."""
        if not self.alive:
            return
        self.log('C', data)
        self.buffer += data
        while self.alive and self.read():
            pass

    def wants(self, holds, what):
        """Notes a violation of the second law; a server that is out of step
        has itself to blame."""
        if not holds and not self.stray:
            self.case.violations.append('%s: %.200r' % (what, self.buffer))

    def read_command(self):
        end = self.buffer.find(b'\n') + 1
        if not end:
            return False
        line = self.buffer[:end]
        known = COMMANDS.fullmatch(line[:-2])
        fits = ANSWER if self.auth else COMMANDS
        self.wants(line.endswith(b'\r\n') and
                   (known if line == b'QUIT\r\n' else
                    fits.fullmatch(line[:-2])), 'no command')
        self.buffer = self.buffer[end:]
        if self.auth and line != b'QUIT\r\n':
            self.go_on_with_auth(line)
        elif known:
            getattr(self, 'on_' + line[:4].strip().decode().lower())(line)
        else:
            self.answer(500, line)
        return True

    def on_quit(self, line):
        self.answer(221, line)
        if self.chance.random() < .9:
            self.alive = False
            self.sock.end()

    def on_helo(self, line):
        self.answer(250, line)

    def on_ehlo(self, line):
        lines = [b' here']
        lines += [b' ' + word for word, share in EXTENSIONS
                  if self.chance.random() < share]
        if self.case.secrets or self.chance.random() < .1:
            methods = [method for method in METHODS
                       if self.chance.random() < .5]
            lines.append(self.chance.choice((b' AUTH ', b' AUTH=')) +
                         b' '.join(methods))
        self.offers_tls = b' STARTTLS' in lines
        self.answer(250, line, lines, (421, 450, 500, 502, 502, 530, 554))

    def on_star(self, line):
        """STARTTLS; what comes of it, FuzzLine decides."""
        if self.answer(220, line, None, (220, 454, 501)) == 220:
            self.read = self.read_tls

    def start_tls(self, check):
        """A handshake that went well; check is the level of the TlsPolicy."""
        self.over_tls, self.read = check, self.read_command
        if self.case.port == 465:
            self.answer(220, refused=(421, 450, 554, 250))

    def read_tls(self):
        """A handshake that comes to nothing."""
        if not self.buffer:
            return False
        self.buffer = b''
        self.clean = False
        kind = self.chance.randrange(5)
        if kind == 0:
            self.mute = True
        elif kind == 1:
            self.leave()
        else:
            self.say((b'\x15\x03\x01\0\2\2\x28', b'220 hello\r\n',
                      b'\x16\x03\x03\xff\xff')[kind - 2])
        return False

    def on_auth(self, line):
        """auth counts the lines to come of the client."""
        self.wants(self.case.secrets, 'AUTH without credentials')
        method = line[5:10]
        first = method == b'PLAIN' and self.chance.random() < .9
        challenge = binascii.b2a_base64(b'<1.2@x>')[:-1]
        if self.chance.random() < .1:
            challenge = self.chance.choice((b'', b'a', b'=', b'x' * 20000))
        code = self.answer_auth(
            235 if first else 334, line, [b' ' + challenge],
            (432, 454, 500, 504, 504, 534, 534, 535, 538))
        self.logged_in = self.logged_in or code == 235
        if code == 334:
            self.auth = 2 if method == b'LOGIN' else 1

    def answer_auth(self, code, line, lines, refused):
        """As answer(), but many quote what they refuse."""
        if self.alive and not self.mute and self.chance.random() < .1:
            return self.echo_refusing(code, line)
        return self.answer(code, line, lines, refused)

    def go_on_with_auth(self, line):
        more, self.auth = self.auth - 1, None
        code = 501 if line == b'*\r\n' else 334 if more else 235
        code = self.answer_auth(code, line, None, (432, 454, 501, 535, 334))
        self.logged_in = self.logged_in or code == 235
        if code == 334:
            self.auth = more or 1       # one 334 too many: it may cancel

    def on_mail(self, line):
        self.wants(line.startswith(b'MAIL FROM:<%s>' % self.case.sender[1]),
                   'another sender')
        self.mail, self.recipients = self.answer(250, line), []

    def on_rcpt(self, line):
        code = self.answer(250 if self.good(self.mail) else 503, line)
        self.recipients.append([line[9:-3], code])
        if code == 421 or code and 300 <= code < 400:
            self.clean = False          # nobody would go on

    @staticmethod
    def good(code):
        return code is not None and 200 <= code < 300

    def somebody(self):
        """Whether there is a sender, and a recipient to give it to."""
        return self.good(self.mail) and any(
            self.good(code) for _, code in self.recipients)

    def on_data(self, line):
        code = 354 if self.somebody() or self.chance.random() < .1 else 503
        self.data_code = self.answer(code, line)
        if self.data_code == 354:
            self.body, self.read = bytearray(b'\r\n'), self.read_message

    def read_message(self):
        start = max(0, len(self.body) - 4)
        self.body += self.buffer
        end = self.body.find(b'\r\n.\r\n', start)
        if end < 0:
            self.buffer = b''
            self.interrupt()
            return False
        self.buffer = bytes(self.body[end + 5:])
        del self.body[end + 2:], self.body[:2]
        self.message_ended(self.case.wire())
        return True

    def interrupt(self):
        """Perhaps says something, or goes, before the message is in."""
        if self.early or self.chance.random() > self.fault / 2:
            return
        self.early = True
        kind = self.chance.randrange(6)
        if kind < 2:
            self.chance.choice((self.leave, self.break_off))(0, b'')
            return
        if kind == 2:
            self.slow = True
            self.sock.stall(self.chance.choice((.5, 1.5, FOREVER)))
            return
        code = self.chance.choice(REFUSALS if kind < 5 else CODES)
        self.stray = self.stray or code < 400
        self.end = code
        self.say(self.spoken(code))
        if self.chance.random() < .4:
            self.leave()

    def message_ended(self, want):
        """The end of a message; a lone dot says that there is none."""
        self.read = self.read_command
        lone = not self.body and want and not self.somebody()
        self.wants(self.body == want or lone, 'another message: %.300r' %
                   bytes(self.body))
        self.complete = self.somebody() and self.body == want
        self.end_at = self.case.now
        self.ahead = self.sock.readable_at() < self.case.now
        if self.early and self.end is not None:
            return              # it has had its answer
        code = self.answer(250 if self.somebody() else 503)
        self.end = code
        if self.complete and self.good(code):
            self.taken_at = self.sock.pushed
            if self.chance.random() < .05:
                self.say(self.chance.choice((
                    b'421 bye', b'221 bye', b'554 no', b'what?', b'250-',
                    b'250 ok\r\n250 ok')) + b'\r\n',
                    self.chance.choice((0, 0, .01, .5)))
            if self.chance.random() < .02:
                self.break_off(None, b'')

    def has_been_taken(self):
        """Whether the client has read that the message is accepted."""
        return self.taken_at is not None and \
            self.sock.received >= self.taken_at

    def rest_is_fine(self):
        """Holds what came last against the grammar."""
        if self.read == self.read_message:
            body, end = bytes(self.body[2:]), b'.\r\nQUIT\r\n'
            want = self.case.wire() + end
            self.wants(want.startswith(body) if self.somebody() else
                       end.startswith(body) or b'QUIT\r\n'.startswith(body),
                       'another message: %.300r' % body)
        elif self.read == self.read_command and self.alive:
            self.wants(b'\r' not in self.buffer[:-1], 'a lone CR')


class ClearLayer:
    """A TlsLayer of which nobody can see that it encrypts."""
    ssl_object, out = None, b''

    def encrypt(self, data):
        self.out += bytes(data)
        return True

    def decrypt(self, data=None):
        return data or b'', data == b''

    def output(self):
        out, self.out = self.out, b''
        return out

    def facts(self):
        return b'TLSv1.3, clear'


class FuzzLine(qr.Connection):
    """A Line whose handshake goes well, as chance has it."""

    def start_tls(self, context, name, seconds, verify_peer, session=None):
        server = self.sock.server
        if server.chance.random() < .4 or server.read != server.read_tls or \
                self.input_pending():
            qr.Connection.start_tls(self, context, name, seconds,
                                    verify_peer, session)
            return
        self.tls = ClearLayer()
        verify_peer(self.tls)
        server.start_tls(server.case.check)


# A case: all that is around the servers

class FuzzClock:
    """A virtual clock, and a wait() on it for sockets that tell when they
    are ready.  What happens goes to log."""

    STEPS = 400000

    def __init__(self, chance, file=None):
        self.chance, self.now, self.steps = chance, 1000.0, 0
        self.file, self.log = file, []

    def step(self):
        self.steps += 1
        if self.steps > self.STEPS:
            raise Violation('no end')

    def clock(self):
        return self.now

    def wait(self, reading, writing, deadline):
        """As the program's."""
        self.step()
        if self.now >= deadline:
            raise qr.TimedOut()
        moment = min([sock.readable_at() for sock in reading] +
                     [sock.writable_at() for sock in writing] + [deadline])
        self.now = max(self.now, moment)
        if self.now >= deadline:
            raise qr.TimedOut()
        return ([sock for sock in reading if sock.readable_at() <= self.now],
                [sock for sock in writing if sock.writable_at() <= self.now])

    def law(self, holds, what):
        if not holds:
            raise Violation(what)

    def transcript(self):
        """What happened, for a human reader."""
        return repr(self.shown)


class FuzzCase(FuzzClock):
    """One delivery: its servers, their addresses and the way there, the
    envelope and the message."""

    def __init__(self, chance, file):
        FuzzClock.__init__(self, chance, file)
        self.servers, self.violations, self.connects = [], [], 0
        self.seconds = chance.choice((1, 5, 600, 1200))
        self.connecting = chance.choice((1, 5, 60))
        self.pipe, self.pieces, self.read_waits = [], [], 0
        self.wire_form = None
        self.choose_mail()
        self.choose_way()

    def choose_mail(self):
        chance = self.chance
        self.sender = chance.choice(SENDERS[:1] * 8 + SENDERS)
        pool = RECIPIENTS_SENT * 4 + RECIPIENTS_8BIT + RECIPIENTS_NEVER
        if chance.random() < .6:
            pool = RECIPIENTS_SENT
        self.recipients = [chance.choice(pool) for _ in range(
            chance.choice((1, 1, 1, 2, 3, 6)))]
        self.message = random_message(chance)
        self.kind = chance.choice(('file',) * 12 + ('pipe',) * 6 +
                                  ('closed', 'stuck'))
        self.reader = qr.Message(self.open_message(), self.seconds,
                                 self.message_wait, self.clock)

    def open_message(self):
        """A descriptor: of a file, which is used again and again, or of a
        pipe, which gets its bytes by pieces, whenever it is waited for."""
        if self.kind == 'file':
            fd = self.file.fileno()
            os.ftruncate(fd, 0)
            os.pwrite(fd, self.message, 0)
            os.lseek(fd, 0, os.SEEK_SET)
            return fd
        if self.kind == 'closed':
            return self.chance.choice((None, -1))
        self.pipe = list(os.pipe())
        self.pieces = [piece for part in range(0, len(self.message), 60000)
                       for piece in cut_at_random(
                           self.chance, self.message[part:part + 60000], 5)]
        if self.kind == 'stuck':
            self.pieces.insert(
                self.chance.randrange(len(self.pieces) + 1), None)
        return self.pipe[0]

    def choose_way(self):
        """The servers, and who may get credentials."""
        chance = self.chance
        self.count = chance.choice((1, 1, 1, 1, 2, 3))
        self.port, self.secrets, route = 25, [], None
        self.net, self.check = b'10.0.0.', None
        self.tls_wanted = chance.random() < .5
        self.named = chance.random() < .5
        if self.named:
            self.count = 1
            self.port = chance.choice((25,) * 30 + (26, 26, 587, 465, 2525))
            if chance.random() < .2:
                self.net = b'127.0.0.'
        credentials, lacking = None, b''
        if chance.random() < .3:
            credentials = self.choose_credentials()
        elif chance.random() < .1:
            lacking = chance.choice((b'user', b'password'))
        relay = b'relay.example' if self.named else None
        route = qr.Route(relay, self.port if self.named else None,
                         credentials, lacking)
        own = qr.Route(None, None, credentials, lacking, True)
        self.configured = self.named and bool(credentials or lacking)
        table = {b'': route}
        self.control = qr.Control(
            HELO_NAME, self.connecting, self.seconds,
            table if self.named or chance.random() < .5 else {},
            chance.choice(({}, table, {b'': own})), [], [], {}, 50)
        if self.named and credentials:
            self.secrets = self.forms
        self.host = b'there.example'

    def choose_credentials(self):
        """User and password that cannot be in a report by chance."""
        def word(mark):
            return mark + bytes(self.chance.choice(b'bcdfgjkvwxz|: \xc3\xa9')
                                for _ in range(self.chance.choice(
                                    (7, 9, 20)))) + mark
        user, password = word(b'Q').replace(b'|', b'_'), word(b'Z')
        both = b'\0' + user + b'\0' + password
        self.forms = [user, password] + [
            binascii.b2a_base64(value)[:-1].rstrip(b'=')
            for value in (user, password, both)]
        return user, password

    def wire(self):
        """What must go out."""
        if self.wire_form is None:
            self.wire_form = reference_wire_form(self.message)
        return self.wire_form

    # The program's collaborators

    def message_wait(self, reading, writing, deadline):
        """The pipe's, that gets its next piece now."""
        self.step()
        if self.kind in ('file', 'closed'):
            return reading, ()
        self.read_waits += 1
        if self.chance.random() < .1:
            self.now += self.seconds * .3
        if not self.pieces:
            os.close(self.pipe.pop())
            self.message_wait = self.ready
            return reading, ()
        piece = self.pieces.pop(0)
        if piece is None:
            self.now = deadline
            self.pieces.insert(0, None)
            raise qr.TimedOut()
        if not piece:
            return self.message_wait(reading, writing, deadline)
        os.write(self.pipe[1], piece)
        return reading, ()

    @staticmethod
    def ready(reading, writing, deadline):
        return reading, ()

    @staticmethod
    def trusted():
        return False

    def ask(self, questions, enough=None):
        """In place of a Resolver's."""
        return [self.lookup(name, qtype) for name, qtype in questions]

    def lookup(self, name, qtype):
        if self.chance.random() < .01:
            return qr.Lookup(qr.Lookup.TEMPORARY, [], False, name)
        if qtype == qr.MX:
            return qr.Lookup(qr.Lookup.OK, [
                (10 * index, b'\3mx%d\0' % index)
                for index in range(1, self.count + 1)], False, name)
        index = name[3:4] if name.startswith(b'\3mx') else b'1'
        values = {b'2': [b'2001:db8::2'] if qtype == qr.AAAA else []}.get(
            index, [self.net + index] if qtype == qr.A else [])
        return qr.Lookup(qr.Lookup.OK, values, False, name)

    @staticmethod
    def own(address):
        return False

    def skip(self, address):
        return self.chance.random() < .01

    def timed_out(self, address):
        pass

    answered = timed_out

    def connect(self, address, port, seconds):
        self.connects += 1
        kind = self.chance.random()
        if kind < .02:
            self.now += seconds
            raise qr.TimedOut()
        if kind < .04:
            raise OSError(self.chance.choice(
                (errno.ECONNREFUSED, errno.ENETUNREACH)), 'no')
        if kind < .041:
            raise qr.LocalFault(qr.NO_RESOURCES)
        self.now += self.chance.choice((0, 0, 0, seconds * .9))
        sock = FuzzSocket(self)
        self.servers.append(FuzzServer(self, sock, address.decode()))
        return sock

    def line(self, sock):
        return FuzzLine(sock, self.wait, self.clock)

    def tls_context(self, policy, control, tls12):
        self.check = policy.level
        return qr.tls_context(policy, control, tls12)

    def tls_control(self, name):
        return qr.TlsControl(None, not self.tls_wanted, None, b'')

    # The run, and what must be true of it

    def run(self):
        """The letter of the message report.  Raises Violation."""
        context = context_of(
            resolver=self, is_own=self.own, tcpto=self, connect=self.connect,
            connection=self.line, message=self.reader,
            tls_control=self.tls_control, tls_context=self.tls_context)
        start = self.now
        try:
            result = qr.deliver(self.host, self.sender[0],
                                [given for given, _ in self.recipients],
                                self.control, context)
        except qr.LocalFault as fault:
            result = qr.Result(fault.report)
        finally:
            for fd in self.pipe:
                os.close(fd)
        self.output, self.result = qr.output_of(result), result
        self.taken = self.now - start
        self.verify_peer()
        return self.text[:1].decode()

    def verify_peer(self):
        for server in self.servers:
            server.rest_is_fine()
            self.law(server.sock.closed, 'a socket is left open')
        self.law(not self.violations, '; '.join(self.violations))
        self.judge_form()
        self.judge_secrets()
        self.law(self.taken <= self.bound(), 'took %s seconds, not %s' % (
            self.taken, self.bound()))
        self.judge_recipients()
        self.judge_acceptance()
        self.judge_verdicts()
        self.judge_configuration()
        if self.text[:1] == b'D':
            self.judge_bounce()

    def judge_verdicts(self):
        """What a spawner makes of it.  Alone goes nobody who may have got
        the message; in company nobody bounces but the first."""
        count = len(self.recipients)
        texts = qr.verdicts(self.result, count)
        self.law(len(texts) == count, 'not a verdict for each')
        told = any(server.recipients for server in self.servers)
        for index, text in enumerate(texts):
            own = (self.reports[index:index + 1] or [b''])[0]
            if count == 1:
                self.law(text[:1].decode() == rspawn_verdict(0, self.output),
                         'another verdict than of qmail-rspawn')
            self.law(text[:1] != b'K' or own == b'r' and
                     self.text[:1] == b'K', 'K for one who has not got it')
            self.law(text[:1] == b'K' or own != b'r' or
                     self.text[:1] != b'K', 'got it, and no K')
            self.law(text or own != b'r' or
                     b'Possible duplicate' not in self.text,
                     'twice, perhaps')
            self.law(text[:1] != b'D' or count == 1 or not index or
                     not told, 'bounced because of others')

    def judge_form(self):
        records = self.output.split(b'\0')
        self.law(records.pop() == b'', 'no NUL at the end')
        self.text, self.reports = records.pop(), records
        self.law(self.text[:1] in (b'K', b'Z', b'D') and
                 self.text.endswith(b'\n'), 'no message report')
        self.law(all(record == b'r' or record[:1] in (b'h', b's') and
                     record.endswith(b'\n') for record in self.reports),
                 'no recipient report')
        self.law(len(self.reports) <= len(self.recipients), 'too many')
        self.law(self.text[:1] != b'K' or
                 len(self.reports) == len(self.recipients), 'too few')

    def judge_secrets(self):
        for secret in getattr(self, 'forms', ()):
            self.law(secret[:8] not in self.output, 'a secret is told')
            self.law(self.secrets or not any(
                secret in data for _, _, mark, data in self.log
                if mark == 'C'), 'a secret for a server that DNS chose')
            self.law(self.port in (25, 26) or self.net == b'127.0.0.' or
                     not any(secret in server.sock.sent
                             for server in self.servers
                             if server.over_tls in (
                                 None, qr.TlsPolicy.IF_OFFERED,
                                 qr.TlsPolicy.UNCHECKED)),
                     'a secret without verified TLS')
        for text in self.reports + [self.text]:
            if b'authentication was rejected' in text:
                words = b'\n'.join(re.findall(br'(?m)^(?:Remote host said: )?'
                                              br'\d{3}[ -](.*)', text))
                self.law(not any(secret[at:at + 4] in words
                                 for secret in self.forms[1:]
                                 for at in range(len(secret) - 3)),
                         'a part of a secret is told')

    def bound(self):
        """As the manual has it (TIMES); twice for what may have to wait for
        room in the send buffer, since servers stall here."""
        auth = 6 if self.secrets else 0
        replies = 3 + 2 + auth          # to MAIL; STARTTLS, EHLO
        parts = 6 + 2 * len(self.wire()) // 65536
        after = 2 * (len(self.recipients) + 3) + parts
        return self.connects * (
            self.connecting + 2 * replies * self.seconds +
            min(self.seconds, 60)) + \
            (after + self.read_waits) * self.seconds

    def judge_recipients(self):
        """Each report against the reply to its recipient."""
        server = self.servers[-1] if self.servers else None
        codes = list(server.recipients) if server else []
        earlier = False
        for record, (_, path) in zip(self.reports, self.recipients):
            if path is None:
                self.law(record[:1] == b'h', 'a bad address is not told of')
                continue
            if b'#4.6.7' in record and any(c > 127 for c in path):
                self.law(record[:1] == b's', 'not for now')
                self.law(not all(path is None or any(c > 127 for c in path)
                                 for _, path in self.recipients),
                         'and no next server')
                continue
            if server is None or server.stray:
                return
            self.law(codes, 'a report without a RCPT')
            sent, code = codes.pop(0)
            self.law(sent == path, 'another recipient: %r' % sent)
            soft = code == 552 and earlier or self.configured and \
                not server.logged_in or record[:1] == b's' and \
                self.tls_is_missing(server) and SECURITY_BYTES.search(record)
            want = b'r' if server.good(code) else b'h' if \
                code and code >= 500 and code != 530 and not soft else b's'
            self.law(record[:1] == want and code is not None and
                     not 300 <= code < 400,
                     '%r for a recipient that got %s' % (record, code))
            earlier = earlier or want == b'r'

    def tls_is_missing(self, server):
        """Whether a server speaks of TLS, and has none from us."""
        return not server.over_tls and (
            server.offers_tls or server.index in [
                before.index for before in self.servers
                if before is not server])

    def judge_acceptance(self):
        """The first law, and that nothing accepted is thought lost."""
        letter = self.text[:1]
        last = self.servers[-1] if self.servers else None
        self.law(letter == b'K' or last is None or last.stray or
                 not last.has_been_taken(),
                 'another letter after a 2xx to the end of the data')
        if last and last.data_code == 354 and last.somebody() and \
                last.clean and not last.slow and not last.stray:
            self.law(len(self.reports) == len(self.recipients),
                     'recipients that nobody is told of')
        for server in self.servers[:-1]:
            self.law(not server.complete, 'a second server after one that '
                     'has the message')
        server = last
        if letter == b'K':
            self.law(server and (server.complete or server.stray and
                                 self.all_sent(server.sock.sent)),
                     'K without a message')
            self.law(server.stray or server.good(server.end),
                     'K without 2xx')
            self.law(not server.ahead, 'K for an answer before the question')
            return
        if not server or server.stray or not server.complete:
            return
        accepted = server.good(server.end)
        if server.end is None or accepted:
            self.law(letter == b'Z' and b'Possible duplicate' in self.text,
                     'a duplicate nobody is told of')
        if accepted and server.clean and not server.slow:
            self.law(False, 'accepted, and not K')

    def all_sent(self, sent):
        """Whether the message and its end left, even if the server, which
        is out of step, was gone by then."""
        return self.wire() + b'.\r\n' in sent

    def judge_configuration(self):
        """No D and no h because of passwords that were not used, nor for
        X.7.x after TLS failed; but an address or a message that cannot be
        sent is refused all the same."""
        server = self.servers[-1] if self.servers else None
        unused = self.configured and server and not (
            server.stray or server.logged_in)
        failed = server and not server.over_tls and server.index in [
            before.index for before in self.servers[:-1]]
        for report in self.reports + [self.text]:
            if report[:1] not in (b'h', b'D') or report.startswith((
                    qr.BAD_RECIPIENT, qr.NO_RECIPIENT, qr.PARTIAL_LINE)):
                continue
            self.law(not unused, 'credentials that were not used: %r' %
                     report)
            self.law(not failed or not SECURITY_BYTES.search(report) or
                     server.index.encode() not in report.split(b'\n')[0],
                     'X.7.x after TLS failed: %r' % report)

    def judge_bounce(self):
        """D only for what a server, DNS or the mail itself has said."""
        last, head = self.message[-1:], self.text.split(b'\n')[0]
        if self.text.startswith(qr.PARTIAL_LINE):
            self.law(last not in (b'\n', b''), 'a whole last line')
        elif self.text.startswith(qr.NO_RECIPIENT):
            self.law(all(path is None for _, path in self.recipients),
                     'recipients left')
        elif b'#5.6.7' in head:
            self.judge_no_smtputf8()
        elif self.text.startswith(b'DGiving up'):
            self.law(all(record[:1] == b'h' for record in self.reports),
                     'not all of them are refused')
        else:
            server = self.servers[-1]
            self.law(any(server.said_5xx for server in self.servers),
                     'D without 5xx')
            if b'sender was rejected' in head:
                self.judge_sender_refused()
            elif not server.stray:
                code = server.data_code if b'on DATA' in head \
                    else server.end
                self.law(code and code >= 500 and code != 530,
                         'D for %s' % code)

    def judge_no_smtputf8(self):
        """Each server that was reached has refused for good, or has no
        SMTPUTF8."""
        self.law(any(c > 127 for c in self.sender[1]) or
                 all(path is None or any(c > 127 for c in path)
                     for _, path in self.recipients), 'ASCII')
        self.judge_sender_refused()

    def judge_sender_refused(self):
        """By each that was reached."""
        foreign = any(c > 127 for c in self.sender[1]) or all(
            path is None or any(c > 127 for c in path)
            for _, path in self.recipients)
        for address in {server.index for server in self.servers}:
            server = [server for server in self.servers
                      if server.index == address][-1]
            self.law(server.stray or server.mail and server.mail >= 500 and
                     server.mail != 530 or foreign and not server.mail,
                     'D for %s to MAIL' % server.mail)

    def transcript(self):
        shown = ['seconds %s, message %s %.300r' % (
            self.seconds, self.kind, self.message),
            'sender %r, recipients %r' % (self.sender[0],
                                          [r for r, _ in self.recipients])]
        together = itertools.groupby(self.log, lambda entry: entry[:3])
        shown += ['%10.3f %s %s %.600r' % (
            key + (b''.join(entry[3] for entry in entries)
                   if key[2] == 'C' else [entry[3] for entry in entries],))
                  for key, entries in together]
        return '\n'.join(shown + ['output %.2000r' % getattr(
            self, 'output', None)])


# Messages, cut at random edges

class FuzzWire(FuzzClock):
    """A message in blocks, and its wire form."""

    def run(self):
        chance = self.chance
        data = bytes(chance.choice(b'ab..\r\r\n\n\n\0\xff')
                     for _ in range(chance.choice((3, 10, 30, 100, 300))))
        data += b'\n' * (chance.random() < .8)
        self.shown = cut_at_random(chance, data, chance.choice((2, 5, 30)))
        got = b''.join(qr.wire_form(self.shown))
        self.law(got == reference_wire_form(
            data[:-1] if data.endswith(b'\r') else data),
            'another wire form: %r' % got)
        self.law(not re.search(b'\r(?!\n)|(?<!\r)\n', got) and
                 b'\r\n.\r\n' not in b'\r\n' + got,
                 'a lone CR or LF, or an early end: %r' % got)
        return 'whole' if data.endswith(b'\n') else 'partial'


# DNS answers

DNS_OWNERS = (b'\xc0\x0c', QUESTION_NAME, b'\x01M\xc0\x0e', b'\x01n\xc0\x0e',
              b'\x01o\x04test\0', b'\xc0\x0e', b'\0')
DNS_FLAGS = (0x8180,) * 12 + (0x8580, 0x81a0, 0x8183, 0x8182, 0x8185, 0x8380,
                             0x8000, 0x0180, 0x8100)


def random_record(chance, qtype):
    """A record, mostly of that type, mostly well-formed."""
    kind = chance.choice((qtype, qtype, qtype, 1, 5, 15, 28, 6, 52, 99))
    if kind in (5, 15):
        data = b'\0\x0a' * (kind == 15) + chance.choice(DNS_OWNERS)
    else:
        data = bytes(chance.randrange(256)
                     for _ in range({1: 4, 28: 16}.get(kind, 35)))
    return (chance.choice(DNS_OWNERS[:1] * 6 + DNS_OWNERS) + struct.pack(
        '>HHLH', kind, 1, 300, len(data)) + data)


def random_answer(chance, ident, question, qtype):
    """A good answer to a question (name, type and class on the wire)."""
    parts = [[random_record(chance, qtype)
              for _ in range(chance.choice(counts))]
             for counts in ((1, 1, 2, 5), (0, 0, 0, 1), (0, 0, 1))]
    parts[2] += [b'\0\0\x29\x04\xd0\0\0\0\0\0\0'] * chance.randrange(2)
    return struct.pack('>6H', ident, chance.choice(DNS_FLAGS), 1,
                       *map(len, parts)) + question + b''.join(
                           itertools.chain(*parts))


def mutated(chance, data, first=0):
    """data with some damage, mostly from first on."""
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        start = first if chance.random() < .9 and first < len(data) else 0
        at = chance.randrange(start, len(data) + 1)
        end, new = chance.choice((
            (2, struct.pack('>H', 0xC000 | max(     # a pointer nearby
                0, at - chance.randrange(-2, 40)))),
            (1, bytes([chance.randrange(256)])),
            (chance.choice((1, 1, 2, 8, 1000)), b''),
            (0, bytes([chance.choice((0, 12, 63, 64, 192, 255))])),
            (0, data[at:at + chance.randrange(30)]),
            (1, bytes([chance.choice((0, 1, 12, 63, 64, 127, 192, 255))])),
            (1, bytes(c ^ 1 << chance.randrange(8) for c in data[at:at + 1]))
        ))
        data[at:at + end] = new
    return bytes(data)


def holds(packet, qtype, value):
    """Whether a packet has the bytes that a value was made of."""
    if qtype == qr.MX:
        parts, at = [struct.pack('!H', value[0])], 0
        while value[1][at]:
            parts.append(value[1][at:at + 1 + value[1][at]])
            at += len(parts[-1])
        return at + 1 == len(value[1]) <= 255 and all(
            part in packet.lower() or part in packet for part in parts)
    if qtype == qr.TLSA:
        start = bytes(value[:3])        # of a short one filled with 255
        return start + value[3] in packet or \
            start.rstrip(b'\xff') + value[3] in packet
    return socket.inet_pton(socket.AF_INET6 if b':' in value
                            else socket.AF_INET, value.decode()) in packet


class FuzzAnswer(FuzzClock):
    """One damaged answer, through parse_answer() and follow()."""

    def run(self):
        chance = self.chance
        qtype = chance.choice((1, 15, 28, 52))
        question = QUESTION_NAME + struct.pack('>2H', qtype, 1)
        packet = random_answer(chance, 0x1234, question, qtype)
        if chance.random() < .9:
            packet = mutated(chance, packet, 12 + len(question))
        self.shown = packet
        try:
            answer = qr.parse_answer(packet, 0x1234, QUESTION_NAME, qtype)
            if answer is None:
                return 'ignored'
            values = qr.follow(answer.records, QUESTION_NAME, qtype)[0]
        except qr.Malformed:
            return 'malformed'
        self.law(packet[:2] == b'\x12\x34' and packet[2] & 0xf8 == 0x80,
                 'no answer to this question')
        self.law(all(holds(packet, qtype, value) for value in values),
                 'not in the packet: %r' % values)
        return 'values' if values else 'empty'


class FuzzNameSocket:
    """A socket to a name server that answers as chance has it."""

    def __init__(self, case, stream):
        self.case, self.chance, self.stream = case, case.chance, stream
        self.coming, self.error, self.closed = collections.deque(), 0, False

    def bind(self, address):
        if self.chance.random() < .1:
            raise OSError(errno.EADDRINUSE, 'in use')

    def connect(self, address):
        if self.chance.random() < .05:
            raise OSError(errno.ENETUNREACH, 'no way')
        if self.stream and self.chance.random() < .5:
            self.error = self.chance.choice((0, 0, errno.ECONNREFUSED))
            raise BlockingIOError()

    def getsockopt(self, *_):
        return self.error

    def close(self):
        self.closed = True

    def readable_at(self):
        return self.coming[0][0] if self.coming else FOREVER

    def writable_at(self):
        return self.case.now

    def recv(self, size):
        self.case.step()
        if self.readable_at() > self.case.now:
            raise BlockingIOError()
        data = self.coming[0][1]
        if data is None:
            raise OSError(errno.ECONNREFUSED, 'refused')
        if data or not self.stream:
            self.coming.popleft()
        if self.stream and len(data) > size:
            self.coming.appendleft([self.case.now, data[size:]])
        return data[:size]

    def send(self, query):
        query = query[2:] if self.stream else query
        when, pieces = self.case.now, []
        for packet in self.case.replies(bytes(query)):
            pieces += cut_at_random(
                self.chance, struct.pack('>H', len(packet)) + packet
            ) if self.stream and packet else [packet]
        for piece in pieces:
            when += self.chance.choice((0, 0, 0, .3, 2))
            if piece is None or piece or not self.stream:
                self.coming.append([when, piece])
        if self.stream and self.chance.random() < .5:
            self.coming.append([when, b''])
        return len(query)


class FuzzResolver(qr.Resolver):
    """A Resolver on such sockets."""

    def _socket(self, server, kind, deadline):
        case = self.clock.__self__
        case.sockets.append(FuzzNameSocket(case, kind == socket.SOCK_STREAM))
        self.open += 1
        return case.sockets[-1]
        yield


class FuzzLookup(FuzzClock):
    """A few questions to name servers out of order."""

    def replies(self, query):
        """What comes back for a query; None is a refusal by ICMP."""
        chance, end = self.chance, query.index(b'\0', 12) + 5
        ident, = struct.unpack_from('>H', query)
        qtype, = struct.unpack_from('>H', query, end - 4)
        replies = []
        for _ in range(chance.choice((0, 1, 1, 1, 1, 2))):
            packet = random_answer(chance, ident, query[12:end], qtype)
            if chance.random() < .5:
                packet = mutated(chance, packet, 12)
            if chance.random() < .05:
                packet = chance.choice((b'', None, packet[:12]))
            replies.append(packet)
        self.shown += [packet for packet in replies if packet]
        return replies

    def run(self):
        chance, self.shown, self.sockets = self.chance, [], []
        config = qr.parse_resolv_conf(chance.choice(
            (b'', b'options use-vc', b'options timeout:1 attempts:3')),
            chance.choice((b'', b'10.0.0.1', b'10.0.0.1 ::1 10.0.0.3')))
        questions = [(QUESTION_NAME, chance.choice((1, 15, 28)))
                     for _ in range(chance.choice((1, 2)))]
        resolver, start = FuzzResolver(config, self.wait, self.clock), self.now
        lookups = resolver.ask(questions)
        self.law(self.now - start <= config.attempts * config.timeout *
                 len(config.servers), 'too long: %s' % (self.now - start))
        self.law(resolver.open == 0 and all(
            sock.closed for sock in self.sockets), 'sockets left open')
        codes = {packet[3] & 15 for packet in self.shown if len(packet) > 11}
        for (_, qtype), lookup in zip(questions, lookups):
            self.law(all(any(holds(packet, qtype, value)
                             for packet in self.shown)
                         for value in lookup.values),
                     'no packet holds %r' % lookup.values)
            self.law(lookup.status != 'no name' or 3 in codes,
                     'no such name, says nobody')
            self.law(lookup.status != 'ok' or codes & {0, 3},
                     'an answer without NOERROR')
        return lookups[0].status


# Control files, addresses

CONTROL_EXAMPLES = (
    b'inside.af.mil:firewall.af.mil:26\n.af.mil:\n:heaven.af.mil\n',
    b':[2001:db8::1]:587|user|pass\nx.example:1.2.3.4;25|a|b|c:d\n',
    b'@example.com|generic|passwd\nmail@example.com:[10.0.0.1]|t|p\n',
    b'info@example.com:smtp.example.com:26|other|otherpw\n# no\n\n',
    b'a@[IPv6:::1]:[::2]:26|u|p\n[::1]:b\n # no\nb\xc3\xbc.x.:r\n',
    b'10.0.0.0/8\n10.1.0.0/255.255.0.0\n2001:db8::/32\n[::1]\n192.0.2.1',
    b'1200\n', b'60 seconds', b'me.example \t\nmore\n',
    b'nameserver 127.0.0.1\nnameserver fe80::1%1\r\noptions timeout:2 '
    b'attempts:9 trust-ad use-vc\n')


class FuzzControl(FuzzClock):
    """One control file, taken for each of them."""

    def run(self):
        chance = self.chance
        data = mutated(chance, chance.choice(CONTROL_EXAMPLES))
        if chance.random() < .2:
            data = bytes(chance.choice(
                b'\n\n::||..[]/;@%# \t\r\0abz0129-\xc3\xa9\xff')
                for _ in range(chance.choice((1, 10, 100))))
        self.shown, good = data, []
        for parse, check in ((qr.parse_routes, self.check_routes),
                             (qr.parse_senders, self.check_routes),
                             (qr.parse_networks, self.check_networks),
                             (qr.parse_helohost, self.check_name)):
            try:
                value = parse(data)
            except qr.Invalid:
                continue
            check(value)
            good.append(parse.__name__[6:7])
        self.law(1 <= qr.parse_number(data, 7) <= 86400, 'a number')
        config = qr.parse_resolv_conf(data, data[:40])
        self.law(1 <= len(config.servers) <= 3 and
                 1 <= config.timeout <= 30 and 1 <= config.attempts <= 5,
                 'resolv.conf')
        return '+'.join(good) or 'none'

    def check_routes(self, routes):
        for key, route in routes.items():
            login = route.credentials or ()
            self.check_name(b''.join((b'x', route.relay or b'') + login))
            self.law(route.port is None or 1 <= route.port <= 65535, 'port')
            self.law(all(login), 'half a password')
            self.law(not route.relay or (
                qr.literal(route.relay) or qr.to_wire(route.relay)),
                'a relay that is no host')
            own = qr.choose_route(key, key, control_files(
                smtproutes={}, authsenders=routes))
            self.law(own.relay or own.credentials is None, 'for nobody')

    def check_networks(self, networks):
        self.law(all(len(address) == len(mask) in (4, 16)
                     for address, mask in networks), 'lengths')
        qr.in_networks(b'10.0.0.1', networks)

    def check_name(self, name):
        self.law(name and not re.search(b'[\r\n\0]', name), 'a name')


# A path without its brackets (RFC 5321 4.1.2).
PATH = re.compile(
    br'(?P<plain>[^\0- \x7f<>@]*|(?P<box>[^\0- \x7f"(),:;<>@[\\\]]+'
    br'|"(?P<quoted>(?:[^"\\\r\n\0]|\\[^\r\n\0])*)")@'
    br'(?P<domain>[^\0- \x7f<>@]*))')


class FuzzAddress(FuzzClock):
    """One address, which may be a host, too."""

    def run(self):
        chance = self.chance
        alphabet = b'ab.@@"\\<> \t\r\n\0(),:;[]\x7f\xc3\xa9\xff-_1' \
            if chance.random() < .5 else bytes(range(256))
        self.shown = text = bytes(chance.choice(alphabet) for _ in range(
            chance.choice((0, 1, 3, 8, 8, 20, 70, 300))))
        for host in text, text.rpartition(b'@')[2]:
            address = qr.literal(host)
            self.law(address is None or qr.canonical(address) == address,
                     'not canonical')
            name = qr.to_wire(host)
            self.law(name is None or re.fullmatch(
                br'[a-z0-9_.-]+', qr.host_text(name) or b'a'), 'no host name')
        path, (box, _, domain) = qr.envelope_address(text), \
            text.rpartition(b'@')
        if path is None:
            self.law(re.search(b'[\r\n\0]', text) or
                     re.search(br'[\0- \x7f<>]', domain), 'refused')
            return 'refused'
        parts = PATH.fullmatch(path)
        self.law(parts, '%r is no path' % path)
        if parts.group('domain') is not None:
            self.law(parts.group('domain') == domain, 'another domain')
            path = parts.group('box') if parts.group('quoted') is None else \
                re.sub(br'(?s)\\(.)', br'\1', parts.group('quoted'))
            self.law(path == box, 'another local part: %r' % path)
        else:
            self.law(path == text, 'another address: %r' % path)
        return 'sent'


# The command and the tests

FUZZ = collections.OrderedDict((
    ('scripts', FuzzCase), ('answers', FuzzAnswer), ('lookups', FuzzLookup),
    ('messages', FuzzWire), ('control', FuzzControl),
    ('addresses', FuzzAddress)))


class Fuzzer:
    """Runs cases of each kind and counts their outcomes."""

    LIMIT = 20                  # seconds for a case, on the real clock

    def __init__(self, seed):
        self.seed, self.messages = seed, tempfile.TemporaryFile(buffering=0)
        self.counts = {kind: collections.Counter() for kind in FUZZ}
        self.taken = collections.Counter()

    def case(self, kind, number):
        chance = random.Random('%s %s %d' % (self.seed, kind, number))
        return FUZZ[kind](chance, self.messages)

    def one(self, kind, number):
        """Runs one case.  Raises Violation with all that there is to know."""
        case = self.case(kind, number)
        signal.alarm(self.LIMIT)
        try:
            self.counts[kind][case.run()] += 1
        except Exception as error:
            raise Violation('SEED=%s KIND=%s CASE=%d: %s\n%s' % (
                self.seed, kind, number, error if isinstance(
                    error, Violation) else traceback.format_exc(),
                case.transcript()))
        finally:
            signal.alarm(0)

    @staticmethod
    def hangs(*_):
        raise Violation('a case that does not end')

    def some(self, kind, start, count, seconds):
        """Up to count cases, no longer than seconds; where it stopped."""
        begun = time.monotonic()
        before = signal.signal(signal.SIGALRM, self.hangs)
        try:
            for number in range(start, start + count):
                self.one(kind, number)
                if number % 16 == 0 and time.monotonic() - begun >= seconds:
                    break
        finally:
            signal.signal(signal.SIGALRM, before)
            self.taken[kind] += time.monotonic() - begun
        return number + 1

    def summary(self):
        for kind, counts in self.counts.items():
            total = sum(counts.values())
            if total:
                yield '%-10s %8d in %5d s, %5d a second: %s' % (
                    kind, total, self.taken[kind],
                    total / (self.taken[kind] or 1), ', '.join(
                        '%s %d' % pair for pair in counts.most_common(8)))


def fuzz():
    """The command: whether all went well."""
    get = os.environ.get
    seed = get('SEED') or str(int.from_bytes(os.urandom(3), 'big'))
    seconds, count = float(get('SECONDS') or 60), int(get('COUNT') or 1 << 60)
    fuzzer, end = Fuzzer(seed), time.monotonic() + seconds
    at = dict.fromkeys(get('KIND').split() if get('KIND') else FUZZ, 0)
    print('SEED=%s' % seed, flush=True)
    try:
        if get('CASE'):
            case = fuzzer.case(list(at)[0], int(get('CASE')))
            try:
                print(case.run())
            finally:
                print(case.transcript())
        while not get('CASE') and min(at.values()) < count and \
                time.monotonic() < end:
            for kind in at:
                if at[kind] < count:
                    at[kind] = fuzzer.some(kind, at[kind], count - at[kind],
                                           3 if kind == 'scripts' else 1)
    except Violation as violation:
        print('VIOLATION\n%s' % violation)
        return False
    finally:
        print('\n'.join(fuzzer.summary()), flush=True)
    return True


class Fuzzing(unittest.TestCase):
    """A little of it in every run: one seed that never changes, and one
    that always does, named if something fails."""

    def test_some(self):
        for kind, count, seconds in (
                ('scripts', 3000, 1), ('answers', 4000, .5),
                ('lookups', 2000, .5), ('messages', 2000, .5),
                ('control', 1500, .4), ('addresses', 5000, .4)):
            for seed in '1', str(int.from_bytes(os.urandom(3), 'big')):
                fuzzer = Fuzzer(seed)
                with self.subTest(kind, seed=seed), fuzzer.messages:
                    fuzzer.some(kind, 0, count, seconds)


# ------------------------------------------------------------ Dialogues

IP = '127.0.0.1'
HOST, SENDER = 'there.example', 'sender@here.example'
RECIPIENTS = ['one@there.example', 'two@there.example', 'three@there.example']

# How a script gets to a stage; what follows is the server's reply there.
TO_EHLO = 'S: 220 fake\nC: EHLO me.example\n'
MAIL = 'C: MAIL FROM:<sender@here.example>\n'
RCPT = 'C: RCPT TO:<one@there.example>\n'
TO_MAIL = TO_EHLO + 'S: 250 fake\n' + MAIL
TO_RCPT = TO_MAIL + 'S: 250 ok\n' + RCPT
TO_DATA = TO_RCPT + 'S: 250 ok\nC: DATA\n'
TO_MESSAGE = TO_DATA + 'S: 354 go\n'
TO_END = TO_MESSAGE + 'D:\n'
ACCEPT = TO_END + 'S: 250 queued\nQ:\n'
FROM_MAIL = MAIL + ACCEPT[len(TO_MAIL):]
STAGES = {'greeting': '', 'EHLO': TO_EHLO, 'MAIL': TO_MAIL, 'RCPT': TO_RCPT,
          'DATA': TO_DATA, 'end of data': TO_END}

ACCEPTED = 'K127.0.0.1 accepted message.\nRemote host said: 250 queued\n'
DIED = 'ZConnected to 127.0.0.1 but connection died. (#4.4.2)\n'
TWICE = ('ZConnected to 127.0.0.1 but connection died. '
         'Possible duplicate! (#4.4.2)\n')
UNREACHED = "ZSorry, I wasn't able to establish an SMTP connection. (#4.4.1)\n"
NO_CONTROL = 'ZUnable to read control files. (#4.3.0)\n'
NO_HOST_NOW = "ZSorry, I couldn't find any host by that name. (#4.1.2)\n"
NO_MESSAGE = 'ZUnable to read message. (#4.3.0)\n'
PARTIAL = ('DSMTP cannot transfer messages with partial final lines. '
           '(#5.6.2)\n')
OWN = ("DSorry. Although I'm listed as a best-preference MX or A for that "
       "host,\nit isn't in my control/locals file, so I don't treat it as "
       "local. (#5.4.6)\n")

BIG = (b'x' * 99 + b'\n') * 80000
MANY = 1500


class Like:
    """A report of which only this is laid down: how it starts, words that
    it must hold, and the most bytes that it may have."""

    def __init__(self, start, *words, most=None):
        self.start, self.words, self.most = start, words, most

    def __eq__(self, report):
        return (report.startswith(self.start)
                and all(word in report for word in self.words)
                and (self.most is None or len(report) <= self.most))

    def __repr__(self):
        return 'like(%s)' % ', '.join(
            repr(x) for x in (self.start,) + self.words)


Row = collections.namedtuple('Row', 'title script reports options')


def row(title, script, *reports, **options):
    """One dialogue: its title, the server's script, the reports to come,
    each as text or Like.  script may also be a dict {address: script}, the
    exchangers of HOST in order of preference; a script of None is an
    exchanger where nobody listens, [] one that must not be called.

    Options: control (a dict of control files; PORT in them becomes the
    fakes' port), recipients (a number, or a list), message, sender, host;
    records and overrides for FakeDNS; wire (the message as the server must
    get it); quiet (a server may see no connection); within (seconds);
    secrets (no report may show ten bytes of one); stdin (a function that
    opens it); others go to run_here(), or, with a command, to
    run_program()."""
    return Row(title, script, reports, options)


def open_servers(scripts):
    """FakeSMTPs for {address: script}, all on one port, and that port."""
    for attempt in range(20):
        servers, port = [], 0
        try:
            for host, script in scripts.items():
                if script is not None:
                    servers.append(FakeSMTP(script, host, port))
                    port = servers[0].port
            return servers, port or 1
        except OSError:
            for server in servers:
                server.close()
            if attempt == 19:
                raise


def exchangers(addresses):
    """DNS records that make these addresses the exchangers of HOST."""
    records = {(HOST, 'MX'): []}
    for i, address in enumerate(addresses, 1):
        name = 'mx%d.%s' % (i, HOST)
        records[HOST, 'MX'].append((10 * i, name))
        records[name, 'AAAA' if ':' in address else 'A'] = [address]
    return records


FILES = threading.Lock()


def at_home(home, function, *args):
    """What function returns where home is the working directory, of which
    a process has but one."""
    with FILES, inside(home):
        return function(*args)


def run_here(home, *args, message=MESSAGE, stdin=None, dns='127.0.0.1:1',
             seconds=None, trust=None, has_ssl=True, narrow=False, port=0):
    """As run_program(), but in this process, for tables with many rows.
    seconds is timeoutremote, which need not be whole; trust is a name of PEM
    that the system is to trust; has_ssl: there is an ssl module; narrow:
    there is next to no room for what is to go out.  port: that
    of all servers on 127.0.0.x and ::1, whatever port the program asks for;
    192.0.2.x is 127.0.0.x, so that a server can be another host's."""
    def connect(address, asked, timeout):
        if address.startswith((b'127.', b'192.0.2.', b'::1')) and asked != 1:
            address, asked = address.replace(b'192.0.2.', b'127.0.0.'), port
        sock = qr.connect(address, asked, timeout)
        if narrow:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return sock

    def tls_context(policy, *options):
        if not has_ssl:
            raise ImportError
        context = at_home(home, qr.tls_context, policy, *options)
        if trust and policy.level == policy.SYSTEM:
            context.load_verify_locations(cadata=PEM[trust])
        return context
    words = [os.fsencode(word) for word in args]
    start = time.monotonic()
    with tempfile.TemporaryFile() as body, tempfile.TemporaryFile() as seen:
        trace = qr.Trace(seen.fileno(), qr.wait)
        body.write(message)
        body.seek(0)
        try:
            control = at_home(home, qr.read_control)
            control.timeoutremote = seconds or control.timeoutremote
            result = qr.deliver(words[0], words[1], words[2:], control, (
                qr.Context(
                    qr.Resolver(qr.parse_resolv_conf(b'', dns.encode()),
                                qr.wait, time.monotonic, trace),
                    qr.OwnAddresses(control.moreipme, control.notipme,
                                    qr.is_local),
                    qr.TcpTo(home.tcpto, time.time, os.getpid(), qr.wait),
                    connect, qr.Connection, qr.Message(
                        body.fileno() if stdin is None else stdin,
                        control.timeoutremote),
                    lambda name: at_home(home, qr.read_tls_control, name),
                    tls_context, None, trace)))
        except qr.LocalFault as fault:
            result = qr.Result(fault.report)
        outcome = Outcome(0, qr.output_of(result), b'',
                          time.monotonic() - start)
        seen.seek(0)
        outcome.trace = seen.read().decode().splitlines()
    return outcome


def converse(row):
    """Plays one row; the problems as text, or ''."""
    options = dict(row.options)
    scripts = row.script
    named = isinstance(scripts, dict)
    if not named:
        scripts = {IP: scripts}
    recipients = options.pop('recipients', 1)
    if isinstance(recipients, int):
        recipients = many(recipients)
    servers, port = open_servers(scripts)
    control = {'smtproutes': b'::PORT' if named else b':127.0.0.1:PORT'}
    if named:
        control['notipme'] = '\n'.join(scripts).encode()
    control.update(options.pop('control', {}))
    control = {name: data and data.replace(b'PORT', b'%d' % port)
               for name, data in control.items()}
    wire = options.pop('wire', None)
    quiet = options.pop('quiet', False)
    within = options.pop('within', None)
    secrets = options.pop('secrets', ())
    records = options.pop('records', None)
    if records is None:
        records = exchangers(scripts) if named else {}
    name_server = FakeDNS(records, options.pop('overrides', {}))
    args = [options.pop('host', HOST), options.pop('sender', SENDER)]
    stdin = options.pop('stdin', None)
    stdin = stdin and stdin()
    run = run_program
    if 'command' not in options:
        run, options['port'] = run_here, port
    options.setdefault('dns', name_server.dns)
    try:
        with Home(**control) as home, name_server:
            outcome = run(home, *(args + recipients), stdin=stdin, **options)
    finally:
        if stdin is not None:
            os.close(stdin)
        for server in servers:
            server.close()
    got = [x.decode('utf-8', 'replace') for x in outcome.reports]
    problems = []
    if list(row.reports) != got:
        problems.append('other reports')
    if (outcome.status, outcome.stderr) != (0, b''):
        problems.append('status %d, stderr %r' % (outcome.status,
                                                  outcome.stderr))
    if within and outcome.seconds > within:
        problems.append('took %.1f seconds' % outcome.seconds)
    for server in servers:
        if server.error and not (quiet and server.connections == 0):
            problems.append('server %s: %s' % (server.host, server.error))
        if wire is not None and server.messages != [wire]:
            problems.append('messages %.300r' % server.messages)
    problems += ['%r of a secret shown' % part for secret in secrets
                 for part in (secret[i:i + 10] for i in range(
                     max(1, len(secret) - 9))) if part in ''.join(got)]
    if not problems:
        return ''
    return '\n'.join(
        [row.title] + problems + ['expected:']
        + ['  %.600r' % report for report in row.reports] + ['got:']
        + ['  %.600r' % report for report in got] + ['the server saw:']
        + ['  ' + line[:200] for server in servers
           for line in server.transcript[-40:]] + ['the client:']
        + ['  ' + line[:200] for line in outcome.trace[-40:]])


class Dialogues(unittest.TestCase):
    """Dialogues with scripted servers."""

    def play(self, rows, workers=4):
        rows = list(rows)
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            for row, problem in zip(rows, pool.map(converse, rows)):
                with self.subTest(row.title):
                    if problem:
                        self.fail(problem)


# PIPELINING (RFC 2920), SIZE (1870), 8BITMIME (6152) and SMTPUTF8 (6531); no
# CHUNKING (3030).  A script that expects several commands before its first
# reply is a server that holds its replies back: a client that waits for one
# never gets it.

def hello(*keywords):
    """A server that offers these keywords, up to the next command."""
    return TO_EHLO + 'S: 250-fake\n' + ''.join(
        'S: 250-%s\n' % keyword for keyword in keywords) + 'S: 250 HELP\n'


def says(*replies):
    return ''.join('S: %s\n' % reply for reply in replies)


def bytewise(*replies):
    """The replies, each of their bytes in a packet of its own."""
    return ''.join('s: \\x%02x\n' % byte for reply in replies
                   for byte in reply.encode() + b'\r\n')


def rcpts(count):
    return ''.join('C: RCPT TO:<%s>\n' % x for x in many(count))


def many(count):
    """This many recipients."""
    return (RECIPIENTS + ['r%d@there.example' % i
                          for i in range(3, count)])[:count]


DATA, QUITTING = 'C: DATA\n', 'C: QUIT\n'
PIPED = hello('PIPELINING')
FLIGHT = MAIL + RCPT + DATA
OK = '250 ok', '250 ok', '354 go'
WIRE = MESSAGE.replace(b'\n', b'\r\n')
DATA_TAKEN = 'D:\nS: 250 queued\nC: QUIT\nS: 221 bye\n'
SAID = 'Remote host said: %s\n'
DISLIKES = '127.0.0.1 does not like recipient.\n' + SAID
GIVES_UP = 'Giving up on 127.0.0.1.\n'
SENDER_NO = 'Connected to 127.0.0.1 but sender was rejected.\n' + SAID
DATA_NO = '127.0.0.1 failed on DATA command.\n' + SAID
MESSAGE_NO = '127.0.0.1 failed after I sent the message.\n' + SAID


def piped(data):
    """A function that opens a pipe with data in it, however long."""
    def opened():
        reader, writer = os.pipe()

        def feed():
            try:
                with os.fdopen(writer, 'wb') as f:
                    f.write(data)
            except OSError:
                pass
        thread = threading.Thread(target=feed)
        thread.daemon = True
        thread.start()
        return reader
    return opened


OFFER = TO_EHLO + 'S: 250-fake\nS: 250 STARTTLS\n'
ASK = OFFER + 'C: STARTTLS\n'
AUTH_NO = ('ZConnected to 127.0.0.1 but authentication was rejected (%s).\n' +
           SAID)

IN_CLEAR = OFFER + FROM_MAIL


class InTheClear(Like):
    """The report of mail that went out after a failure of TLS."""

    def __init__(self, words=''):
        super().__init__(ACCEPTED + 'TLS failed: ' + words,
                         ', sent in the clear\n')

    def __eq__(self, report):
        return super().__eq__(report) and report.count('\n') == 3


def in_clear(words=''):
    return InTheClear(words)


# The matrix: each way to a server, each step of a session, each reply or
# fault there.  What has to come of it, oracle() knows.

CIPHER = 'ECDHE-ECDSA-AES128-GCM-SHA256'
NO_AUTH = ('no supported AUTH method found, continuing without '
           'authentication.\n')
TLS_REFUSED = ASK + 'S: 454 not now\nQ:'
WHY_NO_TLS = 'TLS failed: STARTTLS refused: 454 not now'
WAYS = {        # a way: the keywords of EHLO
    'plain': ['HELP'], 'pipelined': ['PIPELINING'],
    'TLS': ['STARTTLS'], 'pipelined, TLS': ['PIPELINING', 'STARTTLS'],
    'TLS failed': ['STARTTLS'], 'no AUTH': ['AUTH GSSAPI'],
    'pipelined, no AUTH': ['PIPELINING', 'AUTH SCRAM-SHA-256']}
LOGIN_ROUTE = {'smtproutes': b':127.0.0.1:PORT|joe-user|secret-word'}


def steps_of(way):
    """[(step, what the client sends, the reply with which it goes on)]"""
    pipelining, over_tls = 'pipelined' in way, way.endswith('TLS')
    ehlo, envelope = 'C: EHLO me.example\n', [MAIL, RCPT, DATA]
    offer = ''.join('S: 250-%s\n' % x for x in ['fake'] + WAYS[way])
    steps = [('greeting', '', 'S: 220 fake\n'),
             ('EHLO', ehlo, offer + 'S: 250 X\n')]
    if over_tls:
        steps[1:] = [
            ('EHLO in the clear', ehlo, offer + 'S: 250 X\nC: STARTTLS\n'
             'S: 220 go\nTLS: self 1.2 ciphers=%s\n' % CIPHER),
            ('EHLO', ehlo, offer.replace('STARTTLS', 'Y') + 'S: 250 X\n')]
    if pipelining:
        envelope = [''.join(envelope), '', '']
    return steps + list(zip(
        ('MAIL', 'RCPT', 'DATA', 'end of data'), envelope + ['D:\n'],
        says(*OK, '250 queued').splitlines(True)))


def oracle(way, step, lines):
    """The reports if the server says these lines at a step, or nothing that
    can be understood: [].  None: all is well, and the session goes on."""
    code = int(lines[0][:3]) if lines else 0
    kind, said = code // 100, SAID % '\n'.join(lines)
    if {'greeting': code == 220, 'DATA': code == 354}.get(step, kind == 2) \
            and step != 'message':
        return None
    known = ['r'] if step in ('DATA', 'message', 'end of data') else []
    note = NO_AUTH if 'no AUTH' in way and step[:4] not in (
        'gree', 'EHLO') else ''
    if way == 'TLS failed':
        note += WHY_NO_TLS + ', sent in the clear' * (
            step in ('message', 'end of data')) + '\n'
    elif way.endswith('TLS') and step not in ('greeting',
                                              'EHLO in the clear'):
        note += 'TLSv1.2, %s, certificate not checked\n' % CIPHER
    if not lines or kind == 3 and step not in ('greeting', 'DATA') or \
            kind < 4 and step == 'message':
        return known + [(TWICE if step == 'end of data' else DIED) + note]
    soft = kind < 5 or code == 530 or 'no AUTH' in way or \
        way == 'TLS failed' and bool(re.search(r'[ #]5\.7\.\d', said))
    letter = 'Z' if soft else 'D'
    if step == 'RCPT':
        known = ['hs'[soft] + DISLIKES[:-len(SAID)] + said]
        return known + [DIED + said + note if code == 421 else
                        letter + GIVES_UP + note]
    return known + [{
        'greeting': 'ZConnected to 127.0.0.1 but greeting failed.\n',
        'MAIL': letter + SENDER_NO[:-len(SAID)],
        'DATA': letter + DATA_NO[:-len(SAID)],
        'message': letter + MESSAGE_NO[:-len(SAID)],
        'end of data': letter + MESSAGE_NO[:-len(SAID)]}.get(
            step, 'ZConnected to 127.0.0.1 but my name was rejected.\n') +
        said + note]


class Matrix(Dialogues):
    """Every kind of reply, and none, at every step of a session."""

    REPLIES = [['%s-one' % code, str(code)] for code in (
        200, 211, 250, 251, 299, 300, 334, 354, 399, 400, 421, 432, 450,
        499, 500, 503, 530, 552, 554, 599)] + [
        ['550 5.7.1 no'], ['454 4.7.0 no'], ['523 no (#5.7.10)'],
        ['550 5.1.1 no'], ['550 no 10.5.7.3 5.7 5.7.x'], ['250']]

    FAULTS = [      # a script, and what the attempt log says of it
        (script, 'no SMTP reply') for script in (
            'S: hello, nice to meet you', 'S: 25', 'S: 2500 ok', 'S: 250_ok',
            'S:  250 ok', 'S:', 'S: +25 ok', 'S: 2x0 ok',
            'S: \u0662\u0665\u0660 ok', r's: \x00\x00\x00\r\n',
            'S: 100 wait', 'S: 199 wait', 'S: 000 ok', 'S: 600 ok',
            'S: 999 ok', 'S: 250-ok\nS: 550 no', 'S: 550-no\nS: 250 ok',
            'S: 450-later\nS: 550 no')] + [
        ('s: 250 o\nclose', 'connection closed'),
        ('S: 550-no\nclose', 'connection closed'),
        ('close', 'connection closed'),
        ('sleep 0.3\nreset', 'connection reset by peer'),
        ('hang', 'timed out'), ('drip: 250 bit by bit', 'timed out')]

    WORDS = {'greeting': 'greeting failed', 'MAIL': 'sender was rejected'}

    def row(self, way, at, script, lines, words=''):
        """Two rows: one where this server is the only one, and, if the way
        has no password, one where another is to be asked next, or not."""
        steps = steps_of(way)
        step, pipelining = steps[at][0], 'pipelined' in way
        reports, before = oracle(way, step, lines), ''.join(
            sent + good for _, sent, good in steps[:at])
        script = before + steps[at][1] + script + '\n'
        if reports is None:
            script += ''.join(sent + good
                              for _, sent, good in steps[at + 1:]) + 'Q:'
            said = '\n'.join(lines) if step == 'end of data' else \
                '250 queued'
            note = oracle(way, 'end of data', [])[1][len(TWICE):]
            auth = NO_AUTH if 'no AUTH' in way else ''
            reports = ['r', 'K' + auth + ACCEPTED[1:].replace(
                '250 queued', said) + note[len(auth):]]
        elif step[:4] == 'EHLO' and lines and lines[0][0] == '5':
            script += 'C: HELO me.example\n' + says(*lines) + 'Q:'
        elif step == 'RCPT' and pipelining and lines and \
                lines[0][:3] != '421' and lines[0][0] in '45':
            script += 'S: 503 none\nQ:'
        else:
            script += 'Q:'
        scripts = [TLS_REFUSED] * (way == 'TLS failed') + [script]
        if step == 'EHLO' and way.endswith('TLS') and (
                not lines or lines[0][0] == '3'):
            scripts.append(IN_CLEAR)        # TLS counts as failed
            reports = ['r', in_clear(words)]
        title = '%s, %s: %s' % (way, step, script[len(before):])
        options = {'seconds': .3 if words == 'timed out' else None,
                   'control': LOGIN_ROUTE if 'no AUTH' in way else {}}
        yield row(title, scripts, *reports, **options)
        if 'no AUTH' in way:
            return
        if not isinstance(reports[-1], str):
            return
        other, second = [], [x.replace(IP, '127.0.0.2') for x in reports]
        if at < [name for name, _, _ in steps].index('RCPT') and \
                reports[0][0] != 'r':
            words = self.WORDS.get(step, 'my name was rejected') + \
                ': ' + lines[0] if lines and (
                    lines[0][0] != '3' or step == 'greeting') else \
                'out of step' if lines else words
            other, second = ACCEPT, [
                'r', Like(ACCEPTED.replace(IP, '127.0.0.3') + '127.0.0.2: ' +
                          words)]
        yield row(title + ', and another', {
            '127.0.0.2': scripts, '127.0.0.3': other}, *second, **options)

    def rows(self, way):
        share = 1 if way == 'plain' or os.environ.get('THOROUGH') else 4
        steps = [name for name, _, _ in steps_of(way)]
        cells = [(says(*lines)[:-1], lines, '') for lines in self.REPLIES] + \
            [(script, [], words) for script, words in self.FAULTS]
        for at, step in enumerate(steps):
            for number, cell in enumerate(cells):
                if step[:4] == 'EHLO' and (
                        oracle(way, step, cell[1]) is None):
                    continue            # a server without these keywords
                if (at + number) % share == 0:
                    yield from self.row(way, at, *cell)

    def test_plain(self):
        self.play(self.rows('plain'), 12)

    def test_pipelined(self):
        self.play(self.rows('pipelined'), 12)

    def test_tls(self):
        for way in 'TLS', 'pipelined, TLS', 'TLS failed':
            self.play(self.rows(way), 12)

    def test_password_not_used(self):
        """The relay's AUTH may be down for a minute, and its refusals come
        of that: nothing bounces."""
        for way in 'no AUTH', 'pipelined, no AUTH':
            self.play(self.rows(way), 12)

    def test_in_mid_message(self):
        """A refusal is the verdict, whether the server reads on or leaves;
        neither dot nor QUIT goes out after it."""
        def rows():
            for way in WAYS:
                begun = ''.join(sent + good for _, sent, good in steps_of(
                    way)[:-1]) + 'R: 101000\n'
                for lines, end in (
                        (['552-too', '552 big'], 'T:'), (['552 no'], 'close'),
                        (['554 5.7.3 no'], 'T:'), (['530 no'], 'close'),
                        (['452 no'], 'T:'), (['421 no'], 'close'),
                        (['250 ok'], 'T:'), (['354 go'], 'T:'),
                        ([], 'S: hello\nT:'), ([], 'close'), ([], 'reset')):
                    if end == 'T:' and way.endswith('TLS'):
                        end = 'drop'
                    yield row(
                        '%s, in mid-message: %s' % (way, lines + [end]),
                        [TLS_REFUSED] * (way == 'TLS failed') + [
                            'narrow\n' + begun + says(*lines) + end],
                        *oracle(way, 'message', lines),
                        message=BIG[:1000000], narrow=True,
                        control=LOGIN_ROUTE if 'no AUTH' in way else {})
        self.play(rows())

    KINDS = {'r': '250 ok', 's': '450 later', 'h': '550 no'}

    def test_recipients(self):
        """Every combination of 2xx, 4xx and 5xx over 1 to 4 of them.  If
        none is left, a server may open the data phase all the same."""
        def rows():
            for way, mix in ((way, mix) for count in (1, 2, 3, 4)
                             for way in ('plain', 'pipelined')
                             for mix in itertools.product('rsh',
                                                          repeat=count)):
                names = many(len(mix))
                replies = [self.KINDS[kind] for kind in mix]
                reports = ['r' if kind == 'r' else
                           kind + DISLIKES % self.KINDS[kind]
                           for kind in mix]
                script = hello('PIPELINING') + MAIL + rcpts(len(mix)) + \
                    DATA + says('250 ok', *replies)
                if way == 'plain':
                    script = TO_MAIL + 'S: 250 ok\n' + ''.join(
                        'C: RCPT TO:<%s>\nS: %s\n' % pair
                        for pair in zip(names, replies)) + \
                        DATA * ('r' in mix)
                ends = [('S: 354 go\n' + DATA_TAKEN, WIRE)] \
                    if 'r' in mix else [('Q:', None)] if way == 'plain' else [
                        ('S: 354 go\nD:\nC: QUIT\nS: 554 none\nS: 221 bye',
                         b''), ('S: 503 none\nC: QUIT\nS: 221 bye', None)]
                reports.append(ACCEPTED if 'r' in mix else
                               'ZD'['s' not in mix] + GIVES_UP)
                for end, wire in ends:
                    yield row('%s: %s' % (way, ''.join(mix)), script + end,
                              *reports, recipients=names, wire=wire)
        self.play(rows(), 12)

    AUTH = {        # WHAT of the report: the dialogue up to the last reply
        'AUTH PLAIN': 'PLAIN\nC: AUTH PLAIN *\n',
        'plain': 'PLAIN\nC: AUTH PLAIN *\nS: 334 \nC: *\n',
        'AUTH LOGIN': 'LOGIN\nC: AUTH LOGIN\n',
        'username': 'LOGIN\nC: AUTH LOGIN\nS: 334 x\nC: *\n',
        'password': 'LOGIN\nC: AUTH LOGIN\nS: 334 x\nC: *\nS: 334 y\nC: *\n',
        'AUTH CRAM-MD5': 'CRAM-MD5\nC: AUTH CRAM-MD5\n',
        'username+digest':
            'CRAM-MD5\nC: AUTH CRAM-MD5\nS: 334 PDEuMkB4Pg==\nC: *\n'}

    def test_auth(self):
        """None of it is the mail's fault, or makes the program try another
        method; 421 and a lost connection lead to the relay's next address.
        """
        def rows():
            opening = TO_EHLO + 'S: 250-fake\nS: 250 AUTH '
            ends = [(says(*lines), lines, '') for lines in self.REPLIES] + \
                [(script + '\n', [], words) for script, words in self.FAULTS]
            for at, (what, steps) in enumerate(self.AUTH.items()):
                for number, (script, lines, words) in enumerate(ends):
                    code = lines[0][:3] if lines else ''
                    if (code in ('334', '235') or (at + number) % 3) and \
                            not os.environ.get('THOROUGH') and code != '421':
                        continue
                    report = DIED
                    if lines:
                        report = AUTH_NO % (what, '\n'.join(lines))
                        words = 'authentication failed: ' + lines[0]
                    options = {'seconds': .3 if 'timed' in words else None}
                    yield row('%s: %s' % (what, script), opening + steps +
                              script + 'Q:', report, control=LOGIN_ROUTE,
                              **options)
                    again = code == '421' or not lines
                    yield row(
                        '%s: %s, and another' % (what, script), {
                            '127.0.0.2': opening + steps + script + 'Q:',
                            '127.0.0.3': again and opening + self.AUTH[
                                'AUTH PLAIN'] + 'S: 235 ok\n' + FROM_MAIL
                            or []},
                        *['r', Like('K127.0.0.3 accepted message.\n',
                                    '127.0.0.2: ' + words)] if again else
                        [report.replace(IP, '127.0.0.2')],
                        records={('relay.example', 'A'): ['127.0.0.2'],
                                 ('relay.example', 'AAAA'):
                                 ['::ffff:127.0.0.3']},
                        control={'smtproutes': b':relay.example:PORT|joe-user'
                                 b'|secret-word'}, **options)
        self.play(rows(), 12)


class Replies(Dialogues):
    """What the matrix has no room for."""

    def test_oddities(self):
        no = 'h' + DISLIKES % '550 no'
        bye = SAID % '421 closing'
        two = (TO_RCPT + 'S: 550 no\nC: RCPT TO:<two@there.example>\n'
               'S: 250 ok\nC: DATA\n')
        self.play(row(title, script, *reports, **options)
                  for title, script, reports, options in [
            ('no EHLO: HELO; what EHLO offers counts no more', TO_EHLO
             + 'S: 502-what?\nS: 502-AUTH PLAIN\nS: 502 SIZE\n'
             'C: HELO me.example\nS: 250-fake\nS: 250-AUTH PLAIN\n'
             'S: 250 PIPELINING\n' + FROM_MAIL, ['r', ACCEPTED], {}),
            ('HELO refused for now', TO_EHLO + 'S: 502 what?\n'
             'C: HELO me.example\nS: 450 not now\nQ:',
             ['ZConnected to 127.0.0.1 but my name was rejected.\n' +
              SAID % '450 not now'], {}),
            ('lost after HELO', TO_EHLO + 'S: 502 what?\n'
             'C: HELO me.example\nclose', [DIED], {}),
            ('552 after an acceptance is 452', TO_RCPT + 'S: 250 ok\n'
             'C: RCPT TO:<two@there.example>\nS: 552 too many\n'
             'C: RCPT TO:<three@there.example>\nS: 550 no\n' + DATA
             + 'S: 354 go\n' + DATA_TAKEN,
             ['r', 's' + DISLIKES % '552 too many', no, ACCEPTED],
             {'recipients': 3}),
            ('421 to the second of three', TO_RCPT + 'S: 250 ok\n'
             'C: RCPT TO:<two@there.example>\nS: 421 closing\nQ:',
             ['r', 's' + DISLIKES % '421 closing', DIED + bye],
             {'recipients': 3}),
            ('the same, pipelined', PIPED + MAIL + rcpts(3) + DATA
             + says('250 ok', '250 ok', '421 closing') + 'Q:',
             ['r', 's' + DISLIKES % '421 closing', DIED + bye],
             {'recipients': 3}),
            ('lost after the first of two', TO_RCPT + 'S: 550 no\n'
             'C: RCPT TO:<two@there.example>\nclose', [no, DIED],
             {'recipients': 2}),
            ('known recipients are printed', PIPED + MAIL + rcpts(3)
             + DATA + says('250 ok', '550 no', '250 ok') + 'close',
             [no, 'r', DIED], {'recipients': 3}),
            ('refused, taken, and refused at DATA', two + 'S: 451 later\nQ:',
             [no, 'r', 'Z' + DATA_NO % '451 later'], {'recipients': 2}),
            ('refused, taken, and lost at the end', two
             + 'S: 354 go\nD:\nclose', [no, 'r', TWICE],
             {'recipients': 2}),
            ('bare LF ends, and a tab behind the code', 's: 220-fake\\n220 '
             'fake\\n\n' + TO_MAIL.partition('\n')[2] + r's: 250\tok\r\n'
             + '\n' + RCPT + 'S: 250 ok\n' + DATA + 'S: 354 go\nD:\n'
             + r's: 250\tqueued\r\n' + '\nQ:',
             ['r', 'K127.0.0.1 accepted message.\n' + SAID
              % '250\tqueued'], {}),
            ('CR and NUL in a reply', TO_MAIL + r's: 550 a\rb\x00c\r\n'
             + '\nQ:', ['D' + SENDER_NO % '550 ab?c'], {}),
            ('lines without a code behind the first', TO_END
             + 'S: 250-accepted\nS: for delivery\nS:\nS: 250 done\nQ:',
             ['r', ACCEPTED.replace('250 queued', '250-accepted\n'
                                    'for delivery\n\n250 done')], {}),
            ('the same, refused', TO_END
             + 'S: 554-no\nS: see http://x.example\nS: 554 no\nQ:',
             ['r', 'D' + MESSAGE_NO % '554-no\nsee http://x.example\n'
              '554 no'], {}),
            ('the same to MAIL', TO_MAIL
             + 'S: 250-accepted\nS: why not\nS: 250 done\nQ:', [DIED], {}),
            ('codes of one class', TO_END + 'S: 250-one\nS: 251 two\nQ:',
             ['r', ACCEPTED.replace('250 queued', '250-one\n251 two')], {}),
            ('the empty sender', ACCEPT.replace(
                '<sender@here.example>', '<>'), ['r', ACCEPTED],
             {'sender': ''}),
            ('nobody listens', {'127.0.0.2': None}, [UNREACHED], {})])

    def test_too_early(self):
        """Nothing may be waiting unread before a command or the dot."""
        good = {'greeting': '220', 'DATA': '354'}
        self.play(
            row('two replies at once: %s' % stage, before
                + r's: {} ok\r\n{} ok\r\n'.format(good.get(stage, '250'),
                                                  second)
                + ('\nT:' if stage == 'DATA' else '\nQ:'),
                *['r'] * (stage in ('RCPT', 'DATA')) + [DIED])
            for stage, before in STAGES.items() if stage != 'end of data'
            for second in ('250', '354'))

    def test_waiting(self):
        k = Like(ACCEPTED[:-len(' queued\n')], most=5100)

        def rows():
            for title, before in (('EHLO', TO_EHLO), ('the message', TO_END)):
                late = TWICE if before == TO_END else DIED
                for what, steps in (
                        ('lines', 'flood: 250-more x50000000'),
                        ('a line', 's: 250 \nfill: more x50000000')):
                    yield row('%s for ever: %s' % (what, title),
                              before + steps, *['r'] * (late == TWICE)
                              + [late], within=20)
            yield row('a peer that stops reading in mid-message',
                      TO_MESSAGE + 'R: 100\nstall', 'r', DIED,
                      seconds=.5, message=BIG, within=6)
            yield row('two replies of 0.4 seconds fit into 0.6 each',
                      'sleep 0.4\nS: 220 fake\nC: EHLO me.example\n'
                      'sleep 0.4\nS: 250 fake\n' + FROM_MAIL, 'r', ACCEPTED,
                      seconds=.6)
            yield row('refuses in mid-message, reads no more', TO_MESSAGE
                      + 'R: 100\nS: 552 too big\nstall', 'r',
                      'D' + MESSAGE_NO % '552 too big', message=BIG,
                      within=4)
            yield row('a line of 1 MB', TO_END + 's: 250 \nfill: aaaaaaaaaa '
                      'x100000\nS: \nQ:', 'r', k)
            yield row('50,000 continuation lines', TO_END
                      + 'flood: 250-more and more x50000\nS: 250 queued\nQ:',
                      'r', k)
            yield row('many EHLO lines', TO_EHLO + 'flood: 250-X x10000\n'
                      'S: 250 fake\n' + FROM_MAIL, 'r', ACCEPTED)
            for step in ('close', 'reset', 'hang', 'stall',
                         'C: QUIT\nS: 500 ?'):
                yield row('accepts, then ' + step, TO_END + 'S: 250 queued\n'
                          + step, 'r', ACCEPTED, within=3)
        self.play(rows(), workers=10)


class Authentication(Dialogues):
    """AUTH, and where credentials go."""

    USER, PASSWORD = b'joe-user', b'sec|ret:w\xc3\xb6rd'
    ROUTE = b':127.0.0.1:PORT|' + USER + b'|' + PASSWORD

    @staticmethod
    def base64(data):
        return binascii.b2a_base64(data).decode().strip()

    def setUp(self):
        user, password = self.USER, self.PASSWORD
        challenge = b'<1896.697170952@fake.example>'
        digest = hmac.new(password, challenge, 'md5').hexdigest()
        self.plain64 = self.base64(b'\0' + user + b'\0' + password)
        self.user64, self.pass64 = self.base64(user), self.base64(password)
        self.cram64 = self.base64(user + b' ' + digest.encode())
        # Requests, each up to the last reply.
        self.plain = 'C: AUTH PLAIN %s\n' % self.plain64
        self.login = 'C: AUTH LOGIN\n'
        self.login_user = (self.login + 'S: 334 VXNlcm5hbWU6\nC: %s\n'
                           % self.user64)
        self.login_pass = (self.login_user + 'S: 334 UGFzc3dvcmQ6\nC: %s\n'
                           % self.pass64)
        self.cram = 'C: AUTH CRAM-MD5\n'
        self.cram_answer = (self.cram + 'S: 334 %s\nC: %s\n' % (
            self.base64(challenge), self.cram64))
        self.secrets = ['joe-user', 'sec|ret', 'w\u00f6rd', self.user64,
                        self.pass64, self.plain64, self.cram64]

    def row(self, title, methods, steps, *reports, **options):
        """A row where the server offers AUTH methods."""
        options.setdefault('control', {'smtproutes': self.ROUTE})
        options.setdefault('secrets', self.secrets)
        offer = TO_EHLO + 'S: 250-fake\n'
        for line in [methods] if isinstance(methods, str) else methods:
            offer += 'S: 250-%s\n' % line
        return row(title, offer + 'S: 250 HELP\n' + steps, *reports,
                   **options)

    def test_accepted(self):
        then = 'S: 235 welcome\n' + FROM_MAIL
        login_first = self.login_pass + then
        self.play(self.row(title, offer, steps, 'r', ACCEPTED)
                  for title, offer, steps in [
            ('PLAIN', 'AUTH PLAIN', self.plain + then),
            ('LOGIN', 'AUTH LOGIN', login_first),
            ('LOGIN, other prompts', 'AUTH LOGIN', login_first.replace(
                'VXNlcm5hbWU6', 'dXNlcg==').replace('UGFzc3dvcmQ6', '')),
            ('CRAM-MD5', 'AUTH CRAM-MD5', self.cram_answer + then),
            ('the order in the clear: CRAM-MD5',
             'AUTH LOGIN PLAIN CRAM-MD5', self.cram_answer + then),
            ('the order in the clear: PLAIN', 'AUTH LOGIN PLAIN',
             self.plain + then),
            ('AUTH=LOGIN', 'auth=login', login_first),
            ('several lines', ['AUTH GSSAPI LOGIN', 'ETRN', 'AUTH=PLAIN'],
             self.plain + then),
            ('whole words only', 'AUTH XPLAIN PLAIN-X CRAM-MD5-X LOGIN',
             login_first),
            ('an empty 334 to PLAIN', 'AUTH PLAIN', self.plain
             + 'S: 334 \nC: %s\n' % self.plain64 + then),
            ('a bare 334 to PLAIN', 'AUTH PLAIN', self.plain
             + 'S: 334\nC: %s\n' % self.plain64 + then),
            ('504: the next method', 'AUTH PLAIN LOGIN', self.plain
             + 'S: 504 not now\n' + login_first),
            ('twice the next method', 'AUTH PLAIN LOGIN CRAM-MD5', self.cram
             + 'S: 504 no\n' + self.plain + 'S: 504 no\n' + login_first)])

    def test_rejected(self):
        """Only a server that does not take a method gets another one."""
        both = 'AUTH PLAIN LOGIN CRAM-MD5'
        no_cram = self.cram + 'S: 504 no\n'
        undecoded = ('ZConnected to 127.0.0.1 but unable to base64decode '
                     'challenge.\n')
        self.play(self.row(what + ', ' + steps[-40:], offer, steps + '\nQ:',
                           AUTH_NO % (what, said))
                  for what, said, offer, steps in [
            ('plain', '535 bad', 'AUTH PLAIN LOGIN',
             self.plain + 'S: 535 bad'),
            ('username+digest', '535 bad', both,
             self.cram_answer + 'S: 535 bad'),
            ('AUTH PLAIN', '500 what?', 'AUTH PLAIN LOGIN',
             self.plain + 'S: 500 what?'),
            ('AUTH PLAIN', '534 5.7.9 no', both,
             no_cram + self.plain + 'S: 534 5.7.9 no'),
            ('AUTH LOGIN', '534 no', 'AUTH LOGIN CRAM-MD5',
             no_cram + self.login + 'S: 534 no'),
            ('AUTH CRAM-MD5', '534 no', both, self.cram + 'S: 534 no'),
            ('plain', '504 no', 'AUTH PLAIN LOGIN', self.plain
             + 'S: 334 \nC: *\nS: 504 no'),
            ('username', '534 no', 'AUTH LOGIN CRAM-MD5', no_cram
             + self.login + 'S: 334 x\nC: *\nS: 534 no'),
            ('AUTH LOGIN', '504 nor that', 'AUTH PLAIN LOGIN', self.plain
             + 'S: 504 no\n' + self.login + 'S: 504 nor that'),
            ('plain', '334 more', 'AUTH PLAIN', self.plain
             + 'S: 334 \nC: *\nS: 334 more\nC: *'),
            ('password', '334 more', 'AUTH LOGIN', self.login_pass
             + 'S: 334 more\nC: *'),
            ('username+digest', '334 more', 'AUTH CRAM-MD5',
             self.cram_answer + 'S: 334 more\nC: *')])
        self.play(self.row('challenge: ' + challenge, 'AUTH CRAM-MD5',
                           self.cram + challenge + '\nC: *\nQ:',
                           Like(undecoded + 'Remote host said: ', most=5200))
                  for challenge in (
                      'S: 334 !!!', 'S: 334 PDE4O', 'S: 334 PDEu=',
                      'S: 334 PDEu MkB4Pg==',
                      's: 334 \nfill: QUFB x250000\nS: '))

    def test_secrets_are_masked(self):
        cut = len(self.plain64) * 3 // 4
        digest = hmac.new(self.PASSWORD, b'<1896.697170952@fake.example>',
                          'md5').hexdigest()
        self.play(self.row(
            'echo of ' + echo, 'AUTH ' + method, steps
            + 'S: 535-5.7.8 no\nS: 535 %s, sorry\nQ:' % echo,
            Like('ZConnected to 127.0.0.1 but authentication was rejected (',
                 'Remote host said: 535-5.7.8 no\n535 ***\n', most=130),
            secrets=self.secrets + [self.plain64[:cut]])
                  for method, steps, echo in [
            ('PLAIN', self.plain, self.plain64[:cut]),
            ('PLAIN', self.plain, self.plain64[-6:]),
            ('LOGIN', self.login_pass, 'joe-user / sec|ret:w\u00f6rd'),
            ('LOGIN', self.login_pass, self.pass64),
            ('LOGIN', self.login_user, self.user64),
            ('CRAM-MD5', self.cram_answer, self.cram64),
            ('CRAM-MD5', self.cram_answer, digest)])
        self.play(self.row(title, 'AUTH PLAIN', self.plain + reply, report)
                  for title, reply, report in [
            ('echo after %d bytes' % length, 'S: 535-%s\nS: 535 %s %s\nQ:' % (
                'x' * 40, 'x' * length, self.plain64),
             AUTH_NO % ('plain', '535-%s\n535 ***' % ('x' * 40)))
            for length in (4980, 16330)] + [
            ('folded', 'S: 501-bad: AUTH PLAIN %s\nS: 501 %s\nQ:' % (
                self.plain64[:13], self.plain64[13:]),
             AUTH_NO % ('AUTH PLAIN', '501-***\n501 ***')),
            ('the name alone', 'S: 535 no: user joe-user, sorry\nQ:',
             AUTH_NO % ('plain', '535 no: user ***, sorry')),
            ('421', 'S: 421 bye %s\nQ:' % self.plain64[:20],
             AUTH_NO % ('AUTH PLAIN', '421 ***')),
            ('a later refusal', 'S: 235 welcome\n' + MAIL
             + 'S: 550 joe-user may not send sec|ret:w\u00f6rd\nQ:',
             'D' + SENDER_NO % '550 *** may not send ***')])
        self.play([self.row(
            'a challenge that is no base64', 'AUTH CRAM-MD5',
            self.cram + 'S: 334 !sec|!\nC: *\nQ:',
            'ZConnected to 127.0.0.1 but unable to base64decode '
            'challenge.\nRemote host said: 334 ***\n')])

    def test_no_common_method(self):
        accepted = 'r', 'K' + NO_AUTH + ACCEPTED[1:]
        self.play([
            self.row('no AUTH at all', 'ETRN', FROM_MAIL, *accepted),
            self.row('no method named', 'AUTH', FROM_MAIL, *accepted),
            row('HELO only', TO_EHLO + 'S: 500 what?\nC: HELO me.example\n'
                'S: 250 fake\n' + FROM_MAIL, *accepted,
                control={'smtproutes': self.ROUTE}),
            self.row('an address that is never sent', 'HELP', MAIL
                     + 'S: 250 ok\n' + RCPT + 'S: 550 no\nQ:',
                     Like('h', '#5.1.3'), Like('s', '550 no'),
                     Like('ZGiving up', NO_AUTH), recipients=[
                         'a\rb@there.example', RECIPIENTS[0]]),
            row('the next address has AUTH', {
                '127.0.0.2': TO_MAIL + 'S: 550 log in first\nQ:',
                '127.0.0.3': TO_EHLO + 'S: 250-fake\nS: 250 AUTH PLAIN\n'
                + self.plain + 'S: 235 welcome\n' + FROM_MAIL}, 'r',
                Like('K127.0.0.3 accepted', '127.0.0.2: sender was rejected'),
                records={('relay.example', 'A'): ['127.0.0.2'],
                         ('relay.example', 'AAAA'): ['::ffff:127.0.0.3']},
                control={'smtproutes': self.ROUTE.replace(
                    IP.encode(), b'relay.example')}),
            self.row('no MD5: the next method', 'AUTH CRAM-MD5 PLAIN',
                     self.plain + 'S: 235 welcome\n' + FROM_MAIL, 'r',
                     ACCEPTED, command=python(WITHOUT % 'hmac')),
            self.row('no MD5, and no other method', 'AUTH CRAM-MD5', MAIL
                     + 'S: 550 no\nQ:', 'Z' + SENDER_NO % '550 no' + NO_AUTH,
                     command=python(WITHOUT % 'hmac'))])

    def test_a_line_without_a_password_bounces_nothing(self):
        """Nor one without a user; but where DNS has chosen the host, no
        line has a say."""
        here = b':127.0.0.1:PORT'
        note = ('the line of this route in the control files has no %s, '
                'continuing without authentication.\n')
        no = MAIL + 'S: 550 no\nQ:'
        rows = []
        for what, routes, senders in (
                ('password', here + b'|user', None),
                ('password', here + b'|user|', None),
                ('user', here + b'||password', None),
                ('password', here + b'|', None),
                ('password', None, b'@here.example' + here + b'|user'),
                ('password', here + b'|other|word', b'@here.example|user|'),
                ('', here, b'else@here.example|user'),
                ('', here, b'@here.example' + here)):
            control = {'smtproutes': routes, 'authsenders': senders}
            title = '%s %s' % (routes, senders)
            words = note % what if what else ''
            rows += [
                self.row(title, 'AUTH PLAIN', no, 'DZ'[bool(what)]
                         + SENDER_NO % '550 no' + words, control=control),
                self.row(title, 'AUTH PLAIN', FROM_MAIL, 'r', 'K' + words
                         + ACCEPTED[1:], control=control)]
        self.play(rows)
        secret = b'|' + self.USER + b'|' + self.PASSWORD
        server = {'127.0.0.2': TO_EHLO + 'S: 250-fake\nS: 250 AUTH PLAIN '
                  'LOGIN\n' + FROM_MAIL}
        k = ACCEPTED.replace(IP, '127.0.0.2')
        self.play(row('DNS has chosen: %s' % control, server, 'r', k,
                      control=control) for control in (
            {'authsenders': b'sender@here.example' + secret},
            {'authsenders': b'@here.example::PORT' + secret},
            {'smtproutes': b'::PORT' + secret},
            {'authsenders': b'sender@here.example|user'}))

    def test_long_ones(self):
        """An AUTH command has to fit into 512 bytes (RFC 4954 4): a longer
        response goes out after the 334.  What has more than 12288 bytes in
        base64 no server has to take."""
        route = b':127.0.0.1:PORT|joe-user|'
        for size, at_once in ((300, True), (400, False)):
            response = self.base64(b'\0joe-user\0' + b'p' * size)
            control = {'smtproutes': route + b'p' * size}
            self.play([
                self.row('%d bytes' % size, 'AUTH PLAIN', (
                    'C: AUTH PLAIN %s\n' if at_once else
                    'C: AUTH PLAIN\nS: 334 \nC: %s\n') % response +
                    'S: 235 welcome\n' + FROM_MAIL, 'r', ACCEPTED,
                    control=control),
                self.row('%d bytes, rejected' % size, 'AUTH PLAIN', (
                    'C: AUTH PLAIN *\n' if at_once else 'C: AUTH PLAIN\n')
                    + 'S: 535 no\nQ:', AUTH_NO % (
                        'plain' if at_once else 'AUTH PLAIN', '535 no'),
                    control=control)])
        self.play(self.row(
            'too long: ' + what, 'AUTH ' + method, 'Q:', 'ZConnected to '
            '127.0.0.1 but unable to base64encode %s.\n' % what, control={
                'smtproutes': b':127.0.0.1:PORT|' + user + b'|' + password})
                  for what, method, user, password in [
            ('(plain)', 'PLAIN', b'u', b'p' * 9214),
            ('user', 'LOGIN', b'u' * 9217, b'p'),
            ('pass', 'LOGIN', b'u', b'p' * 9217)])

    def test_where_credentials_come_from(self):
        secret = b'|' + self.USER + b'|' + self.PASSWORD
        login = self.plain + 'S: 235 welcome\n' + FROM_MAIL
        here, elsewhere = b':127.0.0.1:PORT', b':127.0.0.1:1'
        self.play(self.row('%s %s' % (senders, routes), 'AUTH PLAIN', steps,
                           'r', ACCEPTED, control={
                               'smtproutes': routes, 'authsenders': senders})
                  for steps, senders, routes in [
            (login, b'Sender@Here.EXAMPLE' + here + secret, elsewhere),
            (login, here + secret, elsewhere),
            (login, b'sender@here.example' + secret, here),
            (login, None, elsewhere + b'\nthere.example' + here + secret),
            (login, None, here + secret + b' \n'),
            (login, None, here.replace(b':PORT', b';PORT') + secret)])


class Messages(Dialogues):
    """The message, as it leaves a session."""

    def test_exact(self):
        many_dots, crs = b'.\n' * 100000, b'ab\r.\n' * 70001
        self.play(row(title, script, *reports, wire=wire, **options)
                  for title, script, reports, wire, options in [
            ('an empty one', ACCEPT, ['r', ACCEPTED], b'',
             {'message': b''}),
            ('smuggled', ACCEPT, ['r', ACCEPTED],
             b'a\r\n..\r\nMAIL FROM:<x@y>\r\n',
             {'message': b'a\r.\rMAIL FROM:<x@y>\n'}),
            ('NUL and 8-bit', ACCEPT, ['r', ACCEPTED],
             bytes(range(14, 256)) + b'\0\r\n',
             {'message': bytes(range(14, 256)) + b'\0\n'}),
            ('many dots', ACCEPT, ['r', ACCEPTED], b'..\r\n' * 100000,
             {'message': many_dots}),
            ('CR at all offsets', ACCEPT, ['r', ACCEPTED],
             b'ab\r\n' + b'..\r\nab\r\n' * 70000 + b'..\r\n',
             {'message': crs}),
            ('through a pipe', ACCEPT, ['r', ACCEPTED], b'..a\r\n',
             {'stdin': piped(b'.a\n')}),
            ('an empty pipe', PIPED + FLIGHT + says(*OK) + DATA_TAKEN,
             ['r', ACCEPTED], b'', {'stdin': piped(b'')}),
            ('a large one', PIPED + FLIGHT + says(*OK) + DATA_TAKEN,
             ['r', ACCEPTED], BIG.replace(b'\n', b'\r\n'),
             {'stdin': piped(BIG)}),
            ('no final newline: nobody is called', [], [PARTIAL], None,
             {'message': b'a\nb'}),
            ('no final newline through a pipe', TO_MESSAGE + 'T:',
             ['r', PARTIAL], None, {'stdin': piped(b'a\nb')}),
            ('a dot without newline, pipelined', PIPED + FLIGHT + says(*OK)
             + 'T:', ['r', PARTIAL], None, {'stdin': piped(b'a\n.')}),
            ('an I/O error', TO_MESSAGE + 'T:', ['r', NO_MESSAGE], None, {
                'stdin': lambda: os.open('/proc/self/mem', os.O_RDONLY)}),
            ('write-only', TO_MESSAGE + 'T:', ['r', NO_MESSAGE], None, {
                'stdin': lambda: os.open(os.devnull, os.O_WRONLY)})])


class Addresses(Dialogues):
    """What goes out as MAIL and RCPT; AddressTables has the forms."""

    SENT = [
        ('UPPER@There.Example', '<UPPER@There.Example>'),
        ('no-at-sign', '<no-at-sign>'), ('a@', '<a@>'),
        ('a@b@there.example', '<"a@b"@there.example>'),
        ('a\\b@there.example', r'<"a\\b"@there.example>'),
        ('a>SIZE=1@there.example', '<"a>SIZE=1"@there.example>'),
        ('l' * 100 + '@there.example', '<%s@there.example>' % ('l' * 100))]
    REFUSED = ['a@there.example\r\nRCPT TO:<x@y>', 'a@there. example',
               'a@there.example> SIZE=1', 'a\nb', '\r']

    @staticmethod
    def talk(recipients, reply='S: 250 ok\n', opening=TO_MAIL + 'S: 250 ok\n'):
        return opening + ''.join('C: RCPT TO:%s\n' % x + reply
                                 for x in recipients)

    def test_addresses(self):
        taken = DATA + 'S: 354 go\nD:\nS: 250 queued\nQ:'
        sent = [wire for _, wire in self.SENT]
        hello = TO_EHLO + 'S: 250 fake\nQ:'
        self.play([
            row('sent', self.talk(sent) + taken,
                *['r'] * len(sent) + [ACCEPTED],
                recipients=[address for address, _ in self.SENT]),
            row('never sent', self.talk(['<one@there.example>']) + taken,
                *[Like('h', '#5.1.3')] * len(self.REFUSED) + ['r', ACCEPTED],
                recipients=self.REFUSED + RECIPIENTS[:1]),
            row('only one, and never sent', [], Like('h', '#5.1.3'),
                Like('D', '#5.1.3'), recipients=['a@b\rc']),
            row('not ASCII, and no SMTPUTF8',
                self.talk(['<one@there.example>']) + taken,
                *[Like('s127.0.0.1 does not take', '#4.6.7')] * 2 + ['r',
                ACCEPTED], recipients=['a@m\u00fcller.example'.encode(),
                                       b'm\xfcller@there.example'] +
                RECIPIENTS[:1]),
            row('a sender never sent', [], Like('D', '#5.1.7'),
                sender='a@b\r\nDATA'),
            row('a sender not ASCII, and no SMTPUTF8', hello,
                Like('D', '#5.6.7'),
                sender='m\u00fcller@here.example'.encode()),
            row('a sender to be quoted', ACCEPT.replace(
                '<sender@here.example>', '<"x> SIZE=1"@c>'), 'r', ACCEPTED,
                sender='x> SIZE=1@c')])

    def test_very_many(self):
        """5,000; and 300 with long replies, all kept and in order."""
        names = many(5000)
        self.play([
            row('5,000', self.talk('<%s>' % x for x in names) + DATA
                + 'S: 354 go\n' + DATA_TAKEN, *['r'] * 5000 + [ACCEPTED],
                recipients=names),
            row('300 refusals', self.talk(
                ['<%s>' % x for x in names[:300]],
                'S: 550 no %s\n' % ('x' * 400)) + 'Q:',
                *['h' + DISLIKES % ('550 no ' + 'x' * 400)] * 300
                + ['D' + GIVES_UP], recipients=names[:300])])


class Exchangers(Dialogues):
    """Which servers are tried, in what order, and what is said of it."""

    def test_order(self):
        """WhereTo has the tables; here they are asked of a name server."""
        order = {(HOST, 'MX'): [(20, 'b.example'), (0, 'c.example'),
                                (65535, 'a.example')],
                 ('a.example', 'A'): ['127.0.0.2'],
                 ('b.example', 'A'): ['127.0.0.3'],
                 ('c.example', 'A'): ['127.0.0.4']}
        a2 = {(HOST, 'A'): ['127.0.0.2']}
        one, k2 = {'127.0.0.2': ACCEPT}, ACCEPTED.replace(IP, '127.0.0.2')
        self.play([row('by preference', {
            '127.0.0.2': [], '127.0.0.3': [], '127.0.0.4': ACCEPT}, 'r',
            k2.replace('.2', '.4'), records=order)])
        self.play(row(title, one, 'r', k2, records=records, **options)
                  for title, records, options in [
            ('no MX: A', a2, dict(host='THERE.Example.')),
            ('a truncated answer: TCP', a2, dict(
                overrides={(HOST, '*'): {'truncate': True}})),
            ('forged answers, then the real one', a2, dict(
                overrides={(HOST, 'A'): self.forged})),
            ('a literal host asks nobody', {}, dict(host='[127.0.0.2]'))])

    def forged(self, query, question, via):
        good = dns_message(question, [
            dns_record(HOST, 'A', '127.0.0.2')])
        lie = dns_record(HOST, 'A', '127.0.0.9')
        return [b'', query[:12], query,
                dns_message(question, [lie], id_=question.id ^ 1),
                dns_message(question._replace(name='x.example'), [lie]),
                dns_message(question._replace(type='AAAA'), [lie]),
                dns_message(question, [lie], flags=0x0180), good]

    @unittest.skipUnless(HAS_IPV6, 'no ::1 here')
    def test_ipv6(self):
        k = ACCEPTED.replace(IP, '::1')
        both = {(HOST, 'MX'): [(1, 'mx.example')],
                ('mx.example', 'AAAA'): ['::1'],
                ('mx.example', 'A'): ['127.0.0.2']}
        only = {'::1': ACCEPT}
        self.play([
            row('AAAA only', only, 'r', k),
            row('a literal with a tag', only, 'r', k, host='[IPv6:0:0::1]'),
            row('IPv4 comes first, then IPv6', {
                '127.0.0.2': None, '::1': ACCEPT}, 'r', Like(k),
                records=both),
            row('a relay in the long form', only, 'r', k, control={
                'smtproutes': b':[0:0:0::0:1];PORT'})])

    def test_none_left(self):
        """Trying has the table of who is reported."""
        no = TO_MAIL + 'S: 550 no\nQ:'
        refused = SENDER_NO.replace(IP, '127.0.0.2') % '550 no'
        trail = '127.0.0.2: sender was rejected: 550 no\n127.0.0.3: '
        self.play([
            row('both refuse MAIL', {'127.0.0.2': no, '127.0.0.3': no},
                Like('D' + refused + trail)),
            row('one refuses MAIL, one dies', {
                '127.0.0.2': no, '127.0.0.3': 'close'},
                Like('Z' + refused + trail)),
            row('one refuses MAIL, one is not there', {
                '127.0.0.2': no, '127.0.0.3': None},
                Like('D' + refused + trail)),
            row('too big for its IPv4, no way to its IPv6', {
                '127.0.0.2': no}, Like('D' + refused), records={
                    (HOST, 'MX'): [(1, 'mx.example')],
                    ('mx.example', 'A'): ['127.0.0.2'],
                    ('mx.example', 'AAAA'): ['2001:db8::2']}),
            row('120 exchangers', dict.fromkeys(
                '127.0.1.%d' % i for i in range(1, 121)), Like(UNREACHED))])

    def test_what_dns_says(self):
        mx, a = (HOST, 'MX'), (HOST, 'A')
        no_host = "DSorry, I couldn't find any host named %s. (#5.1.2)\n"
        no_address = ("DSorry, I couldn't find a mail exchanger or IP "
                      "address. (#5.4.4)\n")
        relay = ("ZSorry, I couldn't find the relay relay.example. "
                 "(#4.4.4)\n")
        to_relay = {'smtproutes': b':relay.example:PORT'}
        self.play(row(title, {'127.0.0.2': []}, report, records=records,
                      **options)
                  for title, report, records, options in [
            ('no such host', no_host % HOST, {}, {}),
            ('exchangers without addresses', no_address, {
                mx: [(1, 'mx.example')], ('mx.example', 'TXT'): [b'\1x']},
             {}),
            ('null MX', 'DSorry, there.example does not accept mail. '
             '(#5.1.10)\n', {mx: [(0, '.')], a: ['127.0.0.2']}, {}),
            ('MX fails for now: no A instead', NO_HOST_NOW, {
                a: ['127.0.0.2']}, dict(overrides={mx: {'rcode': 2}})),
            ('no such relay', relay, {}, dict(control=to_relay)),
            ('a relay fails for now', NO_HOST_NOW, {}, dict(
                control=to_relay,
                overrides={('relay.example', '*'): {'rcode': 2}})),
            ('no such relay in authsenders', relay, {}, dict(control={
                'authsenders': b':relay.example:PORT|user|password'})),
            ('a name that is none', no_host % '??a?', {},
             dict(host=b'\x01\xffa ')),
            ('no name server', NO_HOST_NOW, {}, dict(dns='127.0.0.1:1')),
            ('own address', OWN, {a: ['127.0.0.1']},
             dict(control={'notipme': None})),
            ('a better one fails for now', NO_HOST_NOW, {
                mx: [(1, 'a.example'), (2, 'b.example')],
                ('a.example', 'TXT'): [b'\1x'],
                ('b.example', 'A'): ['127.0.0.1']},
             dict(overrides={('a.example', '*'): {'rcode': 2}})),
            ('broadcast', UNREACHED, {a: ['255.255.255.255']}, {})])


class Tcpto(unittest.TestCase):
    """queue/lock/tcpto, seen from outside."""

    @staticmethod
    def record(address, count, when):
        return (socket.inet_aton(address) + bytes([count]) + b'xyz'
                + struct.pack('<L', int(when)) + b'rest')

    def deliver(self, home, port):
        home.write('smtproutes', b':127.0.0.9:%d' % port)
        home.write('timeoutconnect', b'1')
        outcome = run_program(home, HOST, SENDER, RECIPIENTS[0])
        if not os.path.exists(home.tcpto):
            return outcome, None
        with open(home.tcpto, 'rb') as f:
            return outcome, f.read()

    def put(self, home, data):
        with open(home.tcpto, 'wb') as f:
            f.write(data)

    def test_a_connect_timeout(self):
        """TimedOutServers has the table; a full backlog drops what knocks.
        """
        now, us = time.time(), '127.0.0.9'
        before = self.record('10.0.0.1', 1, now) + bytes(16) + \
            self.record('10.0.0.2', 1, now)
        with contextlib.ExitStack() as stack, Home() as home:
            full = stack.enter_context(socket.socket())
            full.bind((us, 0))
            full.listen(0)
            for _ in range(8):
                knock = stack.enter_context(socket.socket())
                knock.setblocking(False)
                knock.connect_ex(full.getsockname())
                if not select.select([], [knock], [], 0.1)[1]:
                    break
            else:
                self.skipTest('this system takes more than the backlog')
            self.put(home, before.ljust(1024, b'\0'))
            outcome, after = self.deliver(home, full.getsockname()[1])
        self.assertEqual(outcome.reports, [UNREACHED.encode()])
        self.assertLess(outcome.seconds, 5)
        then, = struct.unpack_from('<L', after, 24)
        self.assertLess(abs(then - now), 20)
        self.assertEqual(
            before[:16] + socket.inet_aton(us) + b'\1' + bytes(3) +
            after[24:28] + bytes(4) + before[32:], after[:48])

    def test_skip_forget_do_without(self):
        """Also a table that is damaged or absent, or locked by another."""
        now = time.time()
        for title, table, called in [
                ('two timeouts', (2, now - 200), False),
                ('one timeout', (1, now - 5), True),
                ('in future, a clock set back', (2, now + 3600), True),
                ('short', b'x' * 15, True), ('1000 bytes', bytes(1000), True),
                ('locked', bytes(1024), True), ('absent', None, True)]:
            with self.subTest(title), Home() as home, FakeSMTP(
                    ACCEPT if called else [], '127.0.0.9') as server, \
                    open(home.tcpto, 'rb') as lock:
                if isinstance(table, tuple):
                    table = self.record('127.0.0.9', *table).ljust(
                        1024, b'\0')
                self.put(home, table or b'')
                if table is None:
                    os.unlink(home.tcpto)
                elif title == 'locked':
                    fcntl.flock(lock, fcntl.LOCK_EX)
                outcome, after = self.deliver(home, server.port)
                server.close()
                self.assertIsNone(server.error)
                if called:
                    self.assertEqual(outcome.verdict, 'K')
                    if table and table[4:5] in b'\1\2':
                        table = table[:4] + b'\0' + table[5:]
                else:
                    self.assertEqual(outcome.reports[0], UNREACHED.encode())
                self.assertEqual(table, after)


# ------------------------------------------ The process from outside

# The program without a module: ssl, or hmac, which has no MD5 then (FIPS).
WITHOUT = '''
import runpy, sys
sys.modules[%r] = None
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
'''
# The program with arguments that raise an error.
TROUBLE = '''
import sys
class Arguments(list):
    def __getitem__(self, which):
        if which == 0:
            return 'qmail-remote'
        raise %s
path, sys.argv = sys.argv[1], Arguments()
with open(path, encoding='utf-8') as f:
    code = compile(f.read(), path, 'exec')
exec(code, {'__name__': '__main__'})
'''
# Which of fds 0-2 the program found closed; all three are open then.
CLOSED = '''
import os, runpy, sys
closed = runpy.run_path(sys.argv[1])['fill_descriptors']()
for fd in range(3):
    os.fstat(fd)
os._exit(10 + sum(1 << fd for fd in closed))
'''
# Whether something written to fd 2 is seen once the program has begun.
SEEN = '''
import os, runpy, sys
runpy.run_path(sys.argv[1])['fill_descriptors']()
os.write(2, b'seen')
'''


def python(code, program=None):
    """The command that runs this code with the program as its argument, as
    bytecode if no file is given."""
    return [sys.executable, '-ISB', '-c', code, program or compiled()]


def bin_with_python3():
    """A directory for $PATH where python3 is the Python of this run."""
    path = tempfile.mkdtemp(prefix='qmail-')
    os.symlink(sys.executable, os.path.join(path, 'python3'))
    return path


@contextlib.contextmanager
def descriptors_left(number):
    """Meanwhile only so many more descriptors can be opened."""
    lowest = os.dup(0)
    os.close(lowest)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + number, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def children_of(pid):
    """The processes whose parent is pid; none without /proc."""
    found = []
    for name in os.listdir('/proc') if os.path.isdir('/proc') else ():
        try:
            with open('/proc/%s/stat' % name, 'rb') as f:
                fields = f.read().rpartition(b')')[2].split()
        except OSError:
            continue
        if name.isdigit() and int(fields[1]) == pid:
            found.append(int(name))
    return found


def runs(pid):
    """Whether a process is there, and no zombie."""
    try:
        with open('/proc/%d/stat' % pid, 'rb') as f:
            return f.read().rpartition(b')')[2].split()[0] != b'Z'
    except OSError:
        return False


class Hanging:
    """A delivery, begun, to a server that never says a word."""

    def __init__(self, command):
        self.server, self.bin = FakeSMTP('hang'), bin_with_python3()
        self.home = Home(smtproutes=b':' + self.server.address.encode(),
                         timeoutremote=b'60')

        def heed():
            """The signals that our parent may have made us ignore (nohup, a
            command with & in a script)."""
            for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM,
                           signal.SIGALRM):
                signal.signal(number, signal.SIG_DFL)
        with tempfile.TemporaryFile() as body:
            self.child = subprocess.Popen(
                command + [HOST, SENDER, RECIPIENTS[0]], stdin=body,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                preexec_fn=heed, env={'PATH': self.bin + ':/usr/bin:/bin',
                     'QMAILHOME': self.home.path})
        end = time.monotonic() + 10
        while not self.server.connections and time.monotonic() < end:
            time.sleep(0.02)

    def verdict(self):
        """The letter that the end of it amounts to, and stderr."""
        output, stderr = self.child.communicate(timeout=15)
        return rspawn_verdict(self.child.returncode, output), stderr

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.child.poll() is None:
            self.child.kill()
            self.child.wait()
        self.child.stdout.close()
        self.child.stderr.close()
        self.server.close()
        shutil.rmtree(self.bin)
        self.home.__exit__()


class Process(unittest.TestCase):
    """Usage, control files, descriptors, limits, signals, and the sh form.

    Delivers to a server that accepts, unless a test says otherwise."""

    @classmethod
    def setUpClass(cls):
        cls.kill_a_sh()

    @classmethod
    def tearDownClass(cls):
        cls.killed.__exit__()

    def setUp(self):
        self.server = FakeSMTP([ACCEPT] * 40)
        self.addCleanup(self.server.close)
        self.home = Home(smtproutes=b':' + self.server.address.encode())
        self.addCleanup(self.home.__exit__)
        self.bin = bin_with_python3()
        self.addCleanup(shutil.rmtree, self.bin)
        self.sh = ['/bin/sh', PROGRAM]
        self.path = {'PATH': self.bin + ':/usr/bin:/bin'}

    def run_it(self, *args, home=None, **options):
        return run_program(home or self.home,
                           *(args or (HOST, SENDER, RECIPIENTS[0])),
                           **options)

    def run_sh(self, *args, **options):
        env = dict(self.path, **options.pop('env', {}))
        return self.run_it(*args, env=env, **dict({'command': self.sh},
                                                   **options))

    def shell(self, line, form=None):
        """A command that runs the program by a line of sh, as "$@"."""
        return ['/bin/sh', '-c', line, 'sh'] + (
            form or [sys.executable, '-IS', PROGRAM])

    def check(self, outcome, *reports):
        self.assertEqual(outcome.reports, [r.encode() for r in reports])
        self.assertEqual((outcome.status, outcome.stderr), (0, b''))
        self.assertEqual(outcome.output[-1:], b'\0')

    def check_accepted(self, outcome):
        self.check(outcome, 'r', ACCEPTED)
        self.assertIsNone(self.server.error)

    def check_sane(self, outcome):
        """Accepted, or a deferral; nothing else."""
        if outcome.verdict == 'K':
            self.assertEqual(outcome.reports, [b'r', ACCEPTED.encode()])
        else:
            self.assertEqual(outcome.verdict, 'Z')
        self.assertEqual(outcome.stderr, b'')

    def test_usage(self):
        usage = 'DI (qmail-remote) was invoked improperly. (#5.3.5)\n'
        for args in ([], [HOST], [HOST, SENDER]):
            self.check(run_program(self.home, *args), usage)
            self.check(run_program(self.home, *args, command=self.sh,
                                   env=self.path), usage)

    def test_home(self):
        home = 'ZUnable to switch to home directory. (#4.3.0)\n'
        for path, report in [('/nonexistent', home), (PROGRAM, home),
                             (self.bin, NO_CONTROL)]:
            self.check(self.run_it(env={'QMAILHOME': path}), report)

    def test_control_files(self):
        """What is no good, and what is; ControlFiles has the tables."""
        here = b':127.0.0.1:%d' % self.server.port
        for name, data, good in (
                ('me', None, False), ('me', b'a\0b', False),
                ('me', b'x' * (1 << 20) + b'\n', False),
                ('helohost', b' \n', False),
                ('smtproutes', b':relay.example:65536', False),
                ('smtproutes', here + b'\r\n', False),
                ('smtproutes', here + b'|us\rer|pass', False),
                ('smtproutes', here + b'\nx:a..b\n', False),
                ('authsenders', b'|user|pa\rss', False),
                ('moreipme', b'10.0.0\n', False),
                ('notipme', b'10.0.0.0/33\n', False),
                ('helohost', b'me.example \t\nsecond line', True),
                ('me', b'me.example\n\n\r\0', True),
                ('timeoutremote', b'9' * 5000, True),
                ('timeoutconnect', b'1_0\r\n', True),
                ('smtproutes', here + b'\n#' + b'x' * 1000000, True),
                ('smtproutes', here + b'\nno colon, CR \r, NUL \0', True)):
            with self.subTest('%s: %.60r' % (name, data)), \
                    Home(smtproutes=here) as home:
                home.write(name, data)
                self.check(self.run_it(home=home), *['r', ACCEPTED] if good
                           else [NO_CONTROL])

    def test_control_files_of_other_kinds(self):
        for kind, name in zip((os.mkdir, os.mkfifo, lambda path: os.symlink(
                '.', path), lambda path: os.symlink(path, path)), (
                    'me', 'timeoutremote', 'smtproutes', 'authsenders')):
            with self.subTest(name), Home() as home:
                home.write(name, None)
                kind(os.path.join(home.path, 'control', name))
                outcome = self.run_it(home=home, timeout=10)
                self.assertEqual('Z', outcome.verdict)  # a FIFO may be empty
                if kind is not os.mkfifo:
                    self.check(outcome, NO_CONTROL)

    def test_stdout(self):
        """Nobody to tell: exit 0, and silently."""
        for line in ('exec "$@" >/dev/full', 'exec "$@" >&-',
                     'exec "$@" <&- >&-', 'exec "$@" >&- 2>&-',
                     'exec "$@" <&- >&- 2>&-'):
            with self.subTest(line):
                outcome = self.run_it(command=self.shell(line))
                self.assertEqual((outcome.status, outcome.output,
                                  outcome.stderr), (0, b'', b''))
        self.server.close()
        for command in self.server.commands:
            self.assertNotIn(b'\0', command)
            self.assertNotIn(b'#4', command)

    def test_a_reader_that_left(self):
        reader, writer = os.pipe()
        os.close(reader)
        with tempfile.TemporaryFile() as body:
            for restore in (True, False):
                child = subprocess.Popen(
                    [sys.executable, '-IS', PROGRAM, HOST, SENDER, 'a@b'],
                    stdin=body, stdout=writer, stderr=subprocess.PIPE,
                    env={'QMAILHOME': '/nonexistent'},
                    restore_signals=restore)
                stderr = child.communicate(timeout=20)[1]
                self.assertEqual((child.returncode, stderr), (0, b''))
        os.close(writer)

    def test_stdin(self):
        for line in ('exec "$@" <&-', 'exec "$@" <&- 2>&-'):
            with self.subTest(line):
                self.check(self.run_it(command=self.shell(line)), NO_MESSAGE)
                self.check(self.run_it(command=self.shell(line, self.sh),
                                       env=self.path), NO_MESSAGE)
        with self.subTest('a directory'):
            outcome = self.run_sh(command=self.shell('exec "$@" </',
                                                     self.sh))
            self.assertEqual((outcome.verdict, outcome.stderr), ('Z', b''))

    def test_stderr(self):
        outcome = self.run_it(command=self.shell('exec "$@" 2>&-'))
        self.check_accepted(outcome)
        outcome = self.run_it(command=self.shell('exec "$@" 2>&1'))
        self.check_accepted(outcome)
        outcome = self.run_sh(command=self.shell('exec "$@" 2>&1', self.sh))
        self.check_accepted(outcome)

    def test_the_sh_form(self):
        self.check_accepted(self.run_sh())
        if os.access(PROGRAM, os.X_OK):
            self.check_accepted(self.run_sh(command=[PROGRAM]))
        outcome = self.run_sh(HOST, SENDER, "a' $(x)`y`\\ *@there.example",
                              env={'IFS': '/', 'ENV': '/dev/null'})
        self.assertEqual(outcome.reports[:1], [DIED.encode()])
        self.server.close()
        self.assertIn(b'RCPT TO:<"a\' $(x)`y`\\\\ *"@there.example>',
                      self.server.commands)

    def test_no_interpreter(self):
        empty = os.path.join(self.bin, 'empty')
        os.mkdir(empty)
        broken = os.path.join(empty, 'python3')
        for text in (None, '', 'no program', '#!/nonexistent/python3\n',
                     '#!/bin/sh\nexit 1\n', '#!/bin/sh\nkill -9 $$\n',
                     '#!/bin/sh\necho Traceback >&2\nexit 2\n'):
            with self.subTest(repr(text)):
                if text is not None:
                    with open(broken, 'w') as f:
                        f.write(text)
                    os.chmod(broken, 0o755)
                outcome = self.run_it(command=self.sh, env={'PATH': empty})
                if text != '':              # an empty script succeeds
                    self.assertEqual(outcome.status, 111)
                self.assertEqual(outcome.verdict, 'Z')
                self.assertEqual((outcome.output, outcome.stderr),
                                 (b'', b''))

    def test_python_environment(self):
        """Planted modules and PYTHON variables change nothing."""
        mark = os.path.join(self.bin, 'mark')
        for name in ('socket', '_socket', 'ssl', 'os', 'select', 'struct',
                     'time', 'sitecustomize', 'usercustomize', 'site'):
            with open(os.path.join(self.bin, name + '.py'), 'w') as f:
                f.write('open(%r, "w"); raise SystemExit(3)\n' % mark)
        copy = os.path.join(self.bin, 'copy.py')
        shutil.copyfile(PROGRAM, copy)
        for env in ({'PYTHONPATH': self.bin}, {'PYTHONHOME': '/nonexistent'},
                    {'PYTHONWARNINGS': 'error'},
                    {'PYTHONSTARTUP': os.path.join(self.bin, 'ssl.py')},
                    {'PYTHONOPTIMIZE': '2', 'PYTHONIOENCODING': 'x',
                     'PYTHONVERBOSE': '9', 'PYTHONINSPECT': '1',
                     'PYTHONUTF8': '7', 'PYTHONDEVMODE': '1'},
                    {'LC_ALL': 'xx_YY', 'LANG': 'tr_TR.ISO-8859-9'}):
            with self.subTest(repr(env)):
                self.check_accepted(self.run_it(env=env, cwd=self.bin))
                self.check_accepted(self.run_sh(env=env, cwd=self.bin))
                self.check_accepted(self.run_sh(
                    env=env, cwd=self.bin, command=['/bin/sh', copy]))
        self.assertFalse(os.path.exists(mark))
        for name in ('PYTHONHASHSEED', 'PYTHONMALLOC'):
            self.check_sane(self.run_sh(env={name: 'x'}))   # may be fatal

    def test_few_descriptors(self):
        """From 4 on; sh itself may need descriptors up to 12 to read a
        file at all."""
        for number in (4, 5, 6, 7):
            self.check_sane(self.run_it(command=self.shell(
                'ulimit -n %d; exec "$@"' % number)))
        for number in (13, 14, 15):
            self.check_sane(self.run_sh(command=self.shell(
                'ulimit -n %d; exec "$@"' % number, self.sh)))

    def test_little_memory(self):
        def attempt(kb):
            return self.run_sh(command=self.shell(
                'ulimit -v %d; exec "$@"' % kb, self.sh))
        steps = [1024 * mb for mb in (6, 10, 16, 20, 24, 32, 64)]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for kb, outcome in zip(steps, pool.map(attempt, steps)):
                with self.subTest('%d KB' % kb):
                    self.check_sane(outcome)

    def test_no_new_process(self):
        """sh cannot start Python, since there are too many processes."""
        os.chmod(self.bin, 0o755)
        copy = os.path.join(self.bin, 'copy.py')
        shutil.copyfile(PROGRAM, copy)

        def limited():
            resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
            if os.geteuid() == 0:       # root has no such limit
                os.setgid(54321)
                os.setuid(54321)
        outcome = self.run_sh(command=['/bin/sh', copy], preexec_fn=limited)
        self.assertEqual((outcome.status, outcome.output, outcome.stderr),
                         (111, b'', b''))

    def test_a_file_size_limit(self):
        """tcpto is written to; a limit of 0 must not kill or bounce."""
        self.check_sane(self.run_sh(command=self.shell(
            'ulimit -f 0; exec "$@"', self.sh)))

    def test_blocked_and_ignored_signals(self):
        old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        try:
            self.check_accepted(self.run_sh())
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)
        self.check_accepted(self.run_sh(restore_signals=False))
        self.check_accepted(self.run_sh(command=self.shell(
            "trap '' CHLD PIPE TERM; exec \"$@\"", self.sh)))

    @classmethod
    def kill_a_sh(cls):
        """Kills the sh of a delivery that hangs; its child is looked at
        later, by the last tests of this class."""
        cls.killed = Hanging(['/bin/sh', PROGRAM])
        cls.workers = children_of(cls.killed.child.pid)
        cls.killed.child.terminate()
        cls.killed_at = time.monotonic()

    @unittest.skipUnless(os.path.exists('/proc/self/stat'), 'no /proc')
    def test_the_child_of_a_killed_sh_ends(self):
        if time.monotonic() > self.killed_at + FakeSMTP.LIMIT - 10:
            # Too late: the server gives up, too, and that ends the child.
            self.killed.__exit__()
            self.kill_a_sh()
        self.assertEqual(1, len(self.workers))
        try:
            self.assertEqual(self.killed.verdict(), ('Z', b''))
            while (any(map(runs, self.workers))
                   and time.monotonic() < self.killed_at + 6):
                time.sleep(0.05)
            self.assertFalse(any(map(runs, self.workers)))
        finally:
            for pid in filter(runs, self.workers):
                os.kill(pid, signal.SIGKILL)

    def test_no_memory_for_the_report(self):
        """What has become of the message is told all the same."""
        command = [sys.executable, '-IS', '-c', """if True:
            import sys
            sys.path.insert(0, %r)
            sys.dont_write_bytecode = True
            import qmail_remote

            def fail(frame, event, arg):
                if event == 'call' and frame.f_code.co_name == 'output_of':
                    sys.setprofile(None)
                    raise MemoryError
            sys.setprofile(fail)
            qmail_remote.main()""" % os.path.dirname(PROGRAM)]
        self.check(self.run_it(command=command), 'r',
                   ACCEPTED.partition('\n')[0] + '\n')

    def test_death_by_signal_is_a_deferral(self):
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM,
                       signal.SIGINT):
            with self.subTest(str(number)), \
                    Hanging([sys.executable, '-IS', PROGRAM]) as hanging:
                hanging.child.send_signal(number)
                self.assertEqual(hanging.verdict(), ('Z', b''))

    def test_fd_2(self):
        """A terminal stays; qmail-rspawn would take anything else that came
        there for reports."""
        master, terminal = os.openpty()
        for stderr in terminal, subprocess.PIPE:
            child = subprocess.Popen(python(SEEN), stderr=stderr)
            text = child.communicate(timeout=20)[1]
            self.assertEqual((child.returncode, text or b''), (0, b''))
        os.close(terminal)
        self.assertEqual(b'seen', os.read(master, 99))
        os.close(master)

    def test_closed_descriptors_are_filled(self):
        """No file or socket ever gets the place of the reports."""
        for closed in range(8):
            line = 'exec "$@"' + ''.join(
                ' %d>&-' % fd for fd in range(3) if closed >> fd & 1)
            with self.subTest(line):
                self.assertEqual(10 + closed, subprocess.call(
                    self.shell(line, python(CLOSED)),
                    stderr=subprocess.DEVNULL))

    def test_whatever_is_not_foreseen(self):
        """A deferral."""
        for error, report in (
                ('MemoryError', qr.NO_MEMORY),
                ('ValueError', qr.NO_RESOURCES),
                ('OSError', qr.NO_RESOURCES),
                ('RecursionError', qr.NO_RESOURCES),
                ('KeyboardInterrupt', qr.NO_RESOURCES),
                ('SystemExit(100)', qr.NO_RESOURCES)):
            with self.subTest(error):
                self.check(self.run_it(command=python(
                    TROUBLE % error, PROGRAM)), report.decode())
        # What even main() cannot report: a deferral, too.
        done = self.run_it(command=python(TROUBLE.replace(
            "return 'qmail-remote'", 'raise OSError') % 'OSError', PROGRAM))
        self.assertEqual((111, b'', b''),
                         (done.status, done.output, done.stderr))

    def test_a_full_pipe_that_does_not_block(self):
        """The reports wait until there is room."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        filled = 0
        try:
            while True:
                filled += os.write(writer, bytes(4096))
        except BlockingIOError:
            pass
        child = subprocess.Popen(
            [sys.executable, '-IS', PROGRAM], stdin=subprocess.DEVNULL,
            stdout=writer, stderr=subprocess.PIPE)
        os.close(writer)
        self.assertRaises(subprocess.TimeoutExpired, child.wait, 0.7)
        with open(reader, 'rb') as f:
            self.assertEqual(qr.USAGE + b'\0', f.read()[filled:])
        self.assertEqual((0, b''), (child.wait(20), child.stderr.read()))
        child.stderr.close()


# ------------------------------------------------------------ A terminal

def on_terminal(home, *args, term='dumb', dns=None, message=MESSAGE,
                env=None):
    """(what appears on a terminal that is fd 2, without its CRs; the
    Outcome)."""
    ours, theirs = pty.openpty()
    seen = []

    def read():
        try:
            while True:
                seen.append(os.read(ours, 65536))
        except OSError:             # EIO: the last one has left
            pass
    reader = threading.Thread(target=read)
    reader.start()
    stderr = os.dup(theirs)
    os.close(theirs)
    environment = {'QMAILHOME': home.path, 'TERM': term,
                   'PATH': os.environ.get('PATH', '/usr/bin:/bin'),
                   'DNSCACHEIP': dns or '127.0.0.1:1'}
    environment.update(env or {})
    try:
        with tempfile.TemporaryFile() as body:
            body.write(message)
            body.seek(0)
            child = subprocess.Popen(
                [sys.executable, '-IS', PROGRAM] + list(args), stdin=body,
                env=environment, stdout=subprocess.PIPE, stderr=stderr)
            os.close(stderr)
            output = child.communicate(timeout=30)[0]
    finally:
        reader.join(10)
        os.close(ours)
    text = b''.join(seen).replace(b'\r\n', b'\n')
    return text, Outcome(child.returncode, output, b'', 0)


class Terminal(unittest.TestCase):
    """What somebody sees who runs it by hand (fd 2 is a terminal)."""

    maxDiff = None

    def test_the_way_of_a_message(self):
        """DNS, the choices, the dialogue."""
        with FakeDNS({('x.example', 'MX'): [(10, 'a.x.example'),
                                            (20, 'b.x.example')],
                      ('a.x.example', 'A'): ['127.0.0.1'],
                      ('b.x.example', 'A'): ['127.0.0.1']}) as dns, \
                FakeSMTP('S: 220 hi\nC: EHLO *\nS: 250-there\n'
                         'S: 250 PIPELINING\nC: MAIL *\nC: RCPT *\nC: DATA\n'
                         'S: 250 ok\nS: 250 ok\nS: 354 go\nD:\n'
                         'S: 250 taken\nQ:') as server:
            port = server.address.rpartition(':')[2]
            with Home(smtproutes=b'x.example::' + port.encode(),
                      notipme=b'127.0.0.0/8') as home:
                seen, outcome = on_terminal(
                    home, 'x.example', 's@me.example', 'r@x.example',
                    dns=dns.dns)
        self.assertEqual('K', outcome.verdict)
        wanted = '''\
--- route: the mail exchangers of x.example, port %s (control/smtproutes)
--- DNS: x.example MX: 10 a.x.example, 20 b.x.example
--- DNS: a.x.example A: 127.0.0.1
--- DNS: a.x.example AAAA: none
--- DNS: b.x.example A: 127.0.0.1
--- DNS: b.x.example AAAA: none
--- server: 127.0.0.1, port %s (a.x.example)
<<< 220 hi
>>> EHLO me.example
<<< 250-there
<<< 250 PIPELINING
>>> MAIL FROM:<s@me.example>
>>> RCPT TO:<r@x.example>
>>> DATA
<<< 250 ok
<<< 250 ok
<<< 354 go
--- message: %d bytes
>>> .
<<< 250 taken
>>> QUIT
''' % (port, port, len(MESSAGE) + MESSAGE.count(b'\n'))
        got = seen.decode().splitlines(True)
        asked = [at for at, line in enumerate(got)
                 if re.match('--- DNS: [ab]', line)]
        got[asked[0]:asked[-1] + 1] = sorted(got[asked[0]:asked[-1] + 1])
        self.assertEqual(wanted, ''.join(got))

    def test_no_server_and_no_name(self):
        with FakeDNS({('x.example', 'MX'): [(10, 'a.x.example')],
                      ('a.x.example', 'CNAME'): ['c.x.example'],
                      ('c.x.example', 'A'): ['127.0.0.9']}) as dns, \
                Home(smtproutes=b'x.example::1',
                     notipme=b'127.0.0.0/8') as home:
            seen, _ = on_terminal(home, 'x.example', '', 'r@x.example',
                                  dns=dns.dns)
            self.assertIn(b'--- DNS: a.x.example A: 127.0.0.9, of '
                          b'c.x.example\n', seen)
            self.assertTrue(seen.endswith(
                b'--- 127.0.0.9: connection refused\n'), seen)
            seen, _ = on_terminal(home, 'y.example', '', 'r@y.example',
                                  dns=dns.dns)
            self.assertIn(b'MX: no such name\n', seen)
            seen, _ = on_terminal(home, 'y.example', '', 'r@y.example')
            self.assertIn(b'MX: temporary failure\n', seen)

    def test_secrets_never_appear(self):
        """Nor what they look like on the wire, sent or echoed."""
        password = b'a secret word'
        for method, rest in (
                ('PLAIN', 'C: AUTH PLAIN *\nS: 535 AUTH PLAIN %s?' %
                 qr.base64(b'\0user\0' + password).decode()),
                ('LOGIN', 'C: AUTH LOGIN\nS: 334 x\nC: *\nS: 334 y\nC: *\n'
                 'S: 535-a secr\nS: 535 et word?'),
                ('CRAM-MD5', 'C: AUTH CRAM-MD5\nS: 334 PDFAeD4=\nC: *\n'
                 'S: 535 no')):
            with FakeSMTP('S: 220 hi\nC: EHLO *\nS: 250-there\nS: 250 AUTH '
                          '%s\n%s\nQ:' % (method, rest)) as server:
                with self.subTest(method), \
                        Home(authsenders=b':' + server.address.encode() +
                             b'|user|' + password) as home:
                    seen, outcome = on_terminal(home, 'x.example', 's@x',
                                                'r@x.example')
            self.assertIn('authentication was rejected', str(outcome.reports))
            self.assertIn(b'with a password (control/authsenders)', seen)
            self.assertIn(b'>>> AUTH ' + method.encode(), seen)
            sent = b'\n'.join(server.commands[1:])
            self.assertNotEqual([], re.findall(b'[A-Za-z0-9+/=]{16,}', sent))
            for secret in [password, b'secret', b'user'] + re.findall(
                    b'[A-Za-z0-9+/=]{16,}', sent):
                self.assertNotIn(secret, seen)

    def test_colours_and_tricks(self):
        """Colours if the terminal has them and NO_COLOR does not forbid
        them; a server cannot send the terminal commands."""
        for term, no_color, code, colours in (
                ('xterm-256color', '', b'550', True),
                ('xterm-256color', '', b'450', True),
                ('dumb', '', b'550', False),
                ('no such terminal', '', b'550', False),
                ('xterm-256color', '1', b'550', False)):
            with self.subTest((term, no_color)), FakeSMTP(
                    's: ' + code.decode() +
                    r' \x1b]0;evil\x07 \x9b2J\t\u00e4\r\r\n'
                    '\nQ:') as server, \
                    Home(smtproutes=b':' + server.address.encode()) as home:
                seen, _ = on_terminal(home, 'x.example', '', 'r@x.example',
                                      term=term, env={'NO_COLOR': no_color})
                self.assertIn(b'\x1b[31m' * colours + b'<<< ' + code +
                              br' \x1b]0;evil\x07 ', seen)
                self.assertEqual(colours, b'\x1b[36m>>> QUIT' in seen, seen)
                if not colours:
                    self.assertEqual(b'', seen.translate(
                        None, bytes(range(32, 127)) + b'\n'))

    def test_progress(self):
        """On one line, now and then, and only if it takes long."""
        clock, ours = VirtualClock(), os.pipe()
        trace = qr.Trace(ours[1], lambda *_: None, clock)
        trace.start_progress()
        for after, sent, size in (
                (0.9, 10, 4000000),             # not long yet
                (0.2, 1000000, 4000000), (0.1, 1100000, 4000000),
                (0.2, 2000000, 4000000), (0.3, 3000000, None),
                (0.3, 4100000, 4000000)):       # an estimate
            clock.now += after
            trace.progress(sent, size)
        trace.write(trace.SENT, b'.')
        os.close(ours[1])
        with open(ours[0], 'rb') as pipe:
            lines = [line.rstrip() for line in pipe.read().split(b'\r')]
        self.assertEqual(
            [b'', b'--- message: 1.0 MB of 4.0 MB, 25 %',
             b'--- message: 2.0 MB of 4.0 MB, 50 %', b'--- message: 3.0 MB',
             b'--- message: 4.1 MB of 4.0 MB, 100 %'],
            lines[:-1] + [lines[-1].split(b'\n')[0].rstrip()])
        self.assertTrue(lines[-1].endswith(b'\n>>> .'))

    def test_a_terminal_that_takes_nothing(self):
        """It is given up, not waited for; nor does one that is gone harm."""
        def full(reading, writing, deadline):
            raise qr.TimedOut()
        ours = os.pipe()
        for wait in (full, lambda *_: os.close(ours[1])):
            trace = qr.Trace(ours[1], wait)
            trace.write(trace.SENT, b'EHLO x')
            self.assertIsNone(trace.fd)
            trace.write(trace.SENT, b'more')
            trace.progress(1, 2)
        os.close(ours[0])


class OutgoingAddress(Tables):
    """control/outgoingip."""

    def test_the_file(self):
        four, six = socket.AF_INET, socket.AF_INET6
        for data, wanted in (
                (None, {}), (b'# none\n\n', {}),
                (b'[192.0.2.1] \n2001:DB8::0:1',
                 {four: b'192.0.2.1', six: b'2001:db8::1'}),
                (b'192.0.2.1/24', self.problem('192.0.2.1/24')),
                (b'host\x1b.example\n', self.problem('host?.example')),
                (b'192.0.2.1\n192.0.2.2\n', self.problem(
                    '192.0.2.2', 'one of each kind is enough'))):
            self.check(wanted, qr.parse_outgoing, data)

    def problem(self, address, why='no IP address'):
        return ('ZI cannot send from %s, which is in control/outgoingip: %s. '
                '(#4.3.0)\n' % (address, why)).encode()

    def run_from(self, source, host=IP):
        """(the reports, who connected)"""
        with FakeSMTP('S: 550 no\nQ:', host) as server, \
                Home(smtproutes=b':' + server.address.encode(),
                     outgoingip=source) as home:
            outcome = run_program(home, 'x.example', '', 'r@x.example')
            return outcome.reports, server.callers

    def test_is_where_connections_come_from(self):
        for source in b'127.0.0.77', b'127.0.0.78\n::1':
            _, callers = self.run_from(source)
            self.assertEqual([source.split(b'\n')[0].decode()], callers)
        _, callers = self.run_from(b'2001:db8::1')      # not asked for
        self.assertEqual(['127.0.0.1'], callers)
        if HAS_IPV6:
            _, callers = self.run_from(b'127.0.0.77\n::1\n', '::1')
            self.assertEqual(['::1'], callers)

    def test_no_descriptor_to_check_it(self):
        """This host's trouble, and no word about a server."""
        with FakeSMTP('hang') as server:
            for left in 0, 1:
                with descriptors_left(left):
                    self.check(qr.NO_RESOURCES, qr.connect, b'127.0.0.1',
                               server.port, 5, b'127.0.0.77')

    def test_not_ours_or_no_address(self):
        """Deferred, and nobody is called; the report names the address."""
        for source, why in ((FOREIGN, 'not an address of this host'),
                            (b'224.0.0.1', 'not an address of this host'),
                            (b'one', 'no IP address')):
            self.assertEqual(([self.problem(source.decode(), why)], []),
                             self.run_from(source))


# ------------------------------------- DNS: what answers may cost

def bound(servers=1, replies=4, recipients=1, parts=1, seconds=5, connect=5,
          dns=0):
    """The manual, TIMES, and two seconds for Python to start."""
    return (dns + servers * (connect + replies * seconds)
            + (recipients + parts + 2) * seconds + 2)


class DnsFaults(Dialogues):
    """What answers may cost; what they mean is in the tables."""

    MX = HOST, 'MX'
    POINTER = b'\xc0\x0c'               # to the name in the question

    @classmethod
    def record(cls, kind, data, owner=POINTER, size=None):
        return owner + struct.pack('!HHIH', DNS_TYPES[kind], 1, 300,
                                   len(data) if size is None else size) + data

    def cost(self, zone):
        """(seconds of CPU, peak of memory in MB) of a delivery in vain.  A
        child's peak is never below that of its parent, hence a small one.
        """
        measure = ('import os, resource, sys\n'
                   'if not os.fork():\n'
                   '    os.execv(sys.executable, sys.argv[1:])\n'
                   'os.wait()\n'
                   'used = resource.getrusage(resource.RUSAGE_CHILDREN)\n'
                   'print(used.ru_utime + used.ru_stime, used.ru_maxrss)\n')
        with zone, Home(smtproutes=b'::1', notipme=b'127.0.0.0/8') as home:
            done = subprocess.run(
                [sys.executable, '-ISc', measure, sys.executable, '-IS',
                 PROGRAM, HOST, SENDER, RECIPIENTS[0]],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=60,
                env={'QMAILHOME': home.path, 'DNSCACHEIP': zone.dns})
        report, _, used = done.stdout.rpartition(b'\0')
        self.assertIn(report[:1], (b'D', b'Z'))
        self.assertIsNone(zone.error)
        seconds, size = used.split()
        return float(seconds), int(size) / 1024

    def test_hostile_zones(self):
        """128 exchangers with names of 125 labels, each answer as long as
        TCP has room for: less than a second and 20 MB."""
        names = [b''.join(b'\1' + b'ab'[i >> bit & 1:][:1]
                          for bit in range(7)) + b'\1x' * 118 + b'\0'
                 for i in range(128)]
        best = [self.record('MX', b'\0\1' + name) for name in names]

        def pointer(i):
            return struct.pack('!H', 0xC00C + 2 * (i % 100))
        floods = {
            'addresses': lambda kind, i: self.record(kind, {
                'A': b'\x7f\1%c%c' % divmod(i, 256),
                'AAAA': bytes(10) + b'\xff\xff\x7f\2%c%c' % divmod(i, 256)
                }.get(kind, b'\3\1\1' + bytes(32))),
            'owners from every label on': lambda kind, i: self.record(
                'TXT', b'', pointer(i)),
            'owners spelled out': lambda kind, i: self.record(
                'TXT', b'', names[i % 128]),
            'aliases': lambda kind, i: self.record(
                'CNAME', b'\1' + pointer(i)[1:] + pointer(i))}

        def flood(record, most):
            bodies = {'MX': (len(best), b''.join(best))}
            for kind in 'A', 'AAAA', 'TLSA':
                count = (most - 300) // len(record(kind, 0))
                bodies[kind] = count, b''.join(
                    record(kind, i) for i in range(count))

            def answer(query, question, via):
                count, body = bodies[question.type]
                plain = dns_message(question._replace(edns=False),
                                    flags=0x81A0)
                if via == 'udp' and len(body) > 1300:
                    return [plain[:2] + b'\x83' + plain[3:]]
                return [plain[:6] + struct.pack('!H', count) + plain[8:] +
                        body]
            return FakeDNS(overrides={('*', '*'): answer})
        quiet = self.cost(FakeDNS())
        for title, record in floods.items():
            for most in 65000, 1300:
                with self.subTest('%s, %d bytes' % (title, most)):
                    seconds, size = self.cost(flood(record, most))
                    self.assertLess(seconds - quiet[0], 1)
                    self.assertLess(size - quiet[1], 20)

    def test_one_broken_exchanger(self):
        """A name server that says nothing about one of them holds up only
        what needs that one."""
        self.play([row('the good one', {'127.0.0.2': ACCEPT}, 'r',
                       ACCEPTED.replace(IP, '127.0.0.2'), records={
                           self.MX: [(10, 'good.example'),
                                     (20, 'bad.example')],
                           ('good.example', 'A'): ['127.0.0.2']},
                       overrides={('bad.example', '*'): {'silent': True}},
                       within=6)])


# -------------------------------------------------- Start and installation

class Start(unittest.TestCase):
    """The few lines of sh and Python in front: whose bytecode they run."""

    MARK = b'Zbytecode\n'

    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix='qmail-start-')
        self.addCleanup(shutil.rmtree, self.dir)
        self.file = os.path.join(self.dir, 'qmail_remote.py')
        shutil.copy(PROGRAM, self.file)
        self.cache = importlib.util.cache_from_source(self.file)
        self.bin = os.path.join(self.dir, 'bin')
        os.mkdir(self.bin)
        os.symlink(sys.executable, os.path.join(self.bin, 'python3'))

    def plant(self, age=0):
        """Bytecode that fits the file (age: written for one of some seconds
        ago), but tells by its report that it has been run."""
        os.mkdir(os.path.dirname(self.cache), 0o755)
        other = os.path.join(self.dir, 'other.py')
        with open(other, 'wb') as f:
            text = b'import os\nos.write(1, %r + b"\\0")\nos._exit(0)\n#' % (
                self.MARK,)
            f.write(text.ljust(os.path.getsize(self.file), b'#'))
        when = os.stat(self.file).st_mtime - age
        os.utime(other, (when, when))
        py_compile.compile(other, self.cache, doraise=True)
        os.chmod(self.cache, 0o644)

    def check(self, bytecode, file=None, command=('sh',)):
        outcome = run_program(
            None, command=list(command) + [file or self.file],
            env={'PATH': self.bin + ':/usr/bin:/bin'})
        self.assertEqual(
            (0, self.MARK if bytecode else qr.USAGE, b''),
            (outcome.status, outcome.reports[0], outcome.stderr))

    def root(self):
        if os.getuid():
            self.skipTest('only root can make bytecode that is trusted')

    def test_bytecode_of_root(self):
        self.root()
        self.check(False)
        self.plant()
        self.check(True)

    def test_through_links(self):
        """And links to links."""
        self.root()
        self.plant()
        for number, target in enumerate((
                self.file, '../qmail_remote.py', 'link0', '../bin/link2')):
            link = os.path.join(self.bin, 'link%d' % number)
            os.symlink(target, link)
            self.check(True, link)

    def test_bytecode_that_is_a_link(self):
        """Not trusted: in a directory like /tmp the owner of a link can make
        it lead elsewhere after it has been looked at."""
        self.root()
        self.plant()
        for path in self.cache, os.path.dirname(self.cache):
            os.rename(path, path + '.real')
            os.symlink(path + '.real', path)
            self.check(False)
            os.unlink(path)
            os.rename(path + '.real', path)
        self.check(True)

    def test_bytecode_that_is_not_trusted(self):
        """For another source, or of others, or that others can write: they
        could have put anything into it."""
        self.plant(age=10)
        self.check(False)
        shutil.rmtree(os.path.dirname(self.cache))
        self.plant()
        directory = os.path.dirname(self.cache)
        for path, mode in ((self.cache, 0o664), (self.cache, 0o646),
                           (directory, 0o775), (directory, 0o1777)):
            before = os.stat(path).st_mode
            os.chmod(path, mode)
            self.check(False)
            os.chmod(path, before)
        self.root()
        self.check(True)
        for path in self.cache, directory:
            try:
                os.chown(path, 65534, -1)
            except OSError as e:
                self.skipTest('root has no other users here: %s' % e)
            self.check(False)
            os.chown(path, 0, -1)
        with open(self.cache, 'r+b') as f:
            f.truncate(os.path.getsize(self.cache) - 20)
        self.check(False)

    def shells(self):
        """Every sh there is, as commands; not every Debian has oksh."""
        return [[find_program(command[0])] + command[1:] for command in (
            ['dash'], ['bash'], ['busybox', 'sh'], ['mksh'], ['ksh93'],
            ['posh'], ['yash'], ['oksh'])
            if command != ['oksh'] or shutil.which('oksh')]

    def status(self, command, data, name='copy'):
        """The exit status of a sh that gets a file with these bytes, or what
        it prints if that is 0."""
        path = os.path.join(self.dir, name)
        with open(path, 'wb') as f:
            f.write(data)
        done = subprocess.run(
            command + [path, HOST, SENDER, RECIPIENTS[0]], timeout=30,
            env={'PATH': self.bin, 'QMAILHOME': '/nonexistent'},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL)
        return done.returncode or done.stdout

    def test_any_sh(self):
        """It runs; and what keeps Python from starting, here a word that
        Python does not know, or a fd 2 that cannot be redirected, ends as
        111."""
        with open(PROGRAM, 'rb') as f:
            whole = f.read()
        null = whole.index(b'>/dev/null')
        for command in self.shells():
            self.check(False, command=command)
            for broken in (whole.replace(b' -ISB ', b' -ISBz ', 1),
                           whole[:null] + b'>/dev/null/x' + whole[null + 10:]):
                self.assertEqual(111, self.status(command, broken), command)

    def test_cut_short(self):
        """A file that ends early: 111.  Only before the trap is set nobody
        can tell sh so.  There a cut in a comment is a deferral, too, since
        nothing is printed; one in the few bytes from the first quote to
        the end of the trap is not, and is left out here."""
        with open(PROGRAM, 'rb') as f:
            whole = f.read()
        quote, trap = b"''':'\n", b"trap 'exit 111' 0\n"
        first, last = whole.index(quote), whole.index(b"\n':'''\n")
        begin = first + len(quote)
        self.assertTrue(whole.startswith(trap, begin))
        code, end = whole.index(b"-c '\n") + 4, whole.index(b"\n' \"$0\"")
        cuts = list(range(0, first, 9)) + [first, begin - 1, begin]
        at = begin + len(trap) - 1
        null = whole.index(b' 3>/dev/null ') + len(b' 3>')
        while at <= last + len(b"\n':'''"):
            # Others would be files that root makes in / and /dev.
            if not null < at < null + len(b'/dev/null'):
                cuts.append(at)
            comment = whole.startswith(
                b'#', whole.rindex(b'\n', 0, at) + 1)
            at += 37 if comment or code < at < end - 37 else 1
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            def bad(number, command):
                """The cuts that end otherwise.  Each sh tries another quarter
                of those with which Python starts."""
                return [(command, size) for size in cuts
                        if (size <= end or (size + number) % 4 == 0) and
                        self.status(command, whole[:size], str(number)) !=
                        (111 if size > begin else b'')]
            shells = self.shells()
            for found in pool.map(bad, range(len(shells)), shells):
                self.assertEqual([], found)
        # Whole statements, and no call of main().
        ends = [found.start() for found in
                re.finditer(b'\n\n\n(?:def|class) ', whole)]
        for size in ends[::len(ends) // 4]:
            self.assertEqual(111, self.status(['/bin/sh'], whole[:size]))

    def test_options_of_python(self):
        """No PYTHON variables, no site, no new bytecode, no locale."""
        os.unlink(os.path.join(self.bin, 'python3'))
        with open(os.path.join(self.bin, 'python3'), 'w') as f:
            f.write('#!/bin/sh\nprintf "%s " "$LC_ALL" "$1" "$2" "$3"\n')
        os.chmod(f.name, 0o755)
        outcome = run_program(
            None, command=['sh', self.file],
            env={'PATH': self.bin + ':/usr/bin:/bin', 'LC_ALL': 'POSIX'})
        self.assertEqual((0, b'C -ISB -X under_sh '),
                         (outcome.status, outcome.output))


# ------------------------------------------------------------ The spawner

def commands(*deliveries):
    """Raw commands: (delnum, recipient[, sender[, messid]])."""
    raw = b''
    for delnum, recipient, *more in deliveries:
        sender, messid = (more + [b's@x.example', b'0/17'][len(more):])[:2]
        raw += b'%c%s\0%s\0%s\0' % (delnum, messid, sender, recipient)
    return raw


class SpawnTables(Tables):
    """The pure half of the spawner, and its clockwork."""

    def test_no_memory_for_the_verdicts(self):
        """What has become of the message is told all the same."""
        def fail(frame, event, arg):
            if event == 'call' and frame.f_code is qr.verdicts.__code__:
                sys.setprofile(None)
                raise MemoryError
        self.addCleanup(sys.setprofile, sys.getprofile())
        sys.setprofile(fail)
        self.check([qr.SPAWN_NO_OPEN],
                   qr.JobRunner(0, qr.unusable_config(b'Z')).run,
                   [b'0/0', b's@x', b'x', b'r@x'])

    def test_commands_in_any_pieces(self):
        raw = commands((0, b'a@b'), (255, b'', b'', b''), (120, b'c@d@e'))
        want = [qr.Command(0, b'0/17', b's@x.example', b'a@b', False),
                qr.Command(255, b'', b'', b'', False),
                qr.Command(120, b'0/17', b's@x.example', b'c@d@e', False)]
        for cut in range(len(raw)):
            for other in range(cut, len(raw)):
                reader, got = qr.CommandReader(), []
                for piece in (raw[:cut], raw[cut:other], raw[other:]):
                    got += reader.take(piece)
                self.assertEqual(want, got)
        self.assertEqual([b'b', b'', b'e'], [each.host() for each in want])

    def test_commands_too_long(self):
        """They end where they end, and keep no more than the most."""
        most = qr.SPAWN_FIELD_MAX
        for size, too_long in ((most, False), (most + 1, True),
                               (3 * most, True)):
            reader, got = qr.CommandReader(), []
            for piece in (b'\7', b'1\0', b's' * (size // 2),
                          b's' * (size - size // 2), b'\0r@h\0\1'):
                got += reader.take(piece)
            self.assertEqual([too_long], [each.too_long for each in got])
            self.assertLessEqual(len(got[0].sender), most)
            self.assertEqual((7, b'r@h'), (got[0].delnum, got[0].recipient))
            got = reader.take(b'1\0s\0r\0')
            self.assertEqual([(1, False)], [(each.delnum, each.too_long)
                                            for each in got])

    BAD = (
        (200, b'1', b'r@h', qr.SPAWN_TOO_BIG),
        (20, b'1', b'r@h', qr.SPAWN_TOO_BIG),
        (19, b'1', b'r@h', None),
        (3, b'1', b'r@h', qr.SPAWN_IN_USE),
        (3, b'x', b'r', qr.SPAWN_IN_USE),
        (0, b'x', b'r@h', qr.SPAWN_NONNUMERIC),
        (0, b'/1', b'r@h', qr.SPAWN_NONNUMERIC),
        (0, b'1/../2', b'r@h', qr.SPAWN_NONNUMERIC),
        (0, b'1 ', b'r@h', qr.SPAWN_NONNUMERIC),
        (0, b'1\n', b'r@h', qr.SPAWN_NONNUMERIC),
        (0, b'12/34/', b'r@h', None),
        (0, b'1' * 99, b'r@h', None),
        (0, b'1' * 100, b'r@h', qr.SPAWN_MESSID_LONG),
        (0, b'x' * 100, b'r@h', qr.SPAWN_NONNUMERIC),
        (0, b'', b'r@h', qr.SPAWN_MESSID_SHORT),
        (0, b'', b'r', qr.SPAWN_MESSID_SHORT),
        (0, b'1', b'r', qr.SPAWN_NO_HOST),
        (0, b'1', b'', qr.SPAWN_NO_HOST),
        (0, b'1', b'r@', None), (0, b'1', b'@', None))

    def test_refusals(self):
        for delnum, messid, recipient, want in self.BAD:
            command = qr.Command(delnum, messid, b'', recipient, False)
            self.assertEqual(want, qr.refusal(command, 20, {3, 5}),
                             (delnum, messid, recipient))
        self.assertEqual(qr.SPAWN_TOO_LONG, qr.refusal(
            qr.Command(200, b'x', b'', b'', True), 20, {3}))

    def test_reports(self):
        """report() of qmail-rspawn.c; the K, Z and D of its records."""
        first = b'hh\0r\0Zz\0Dd\0'
        lost = b'Zqmail-remote produced no output.\n'
        for output, want in (
                (b'', lost), (b'Kk\0', b'Kk'), (b'Zz\0', b'Zz'),
                (b'Dd\0', b'Dd'), (b'x\0', b'D'), (b'K\0', b'K'),
                (b'Kk\0Dd\0', b'Kkd'),
                # recipient reports before the message report
                (b'r\0Kk\0', b'Kk'), (b'r\0Zz\0', b'Zz'), (b'r\0Dd\0', b'Dd'),
                (b'r\0', b'D'), (b'hh\0', b'Dh'), (b'ss\0', b'Zs'),
                (b'hh\0Kk\0', b'Dh'), (b'ss\0Kk\0', b'Zs'),
                (b'hh\0Zz\0', b'Dh'), (b'ss\0Zz\0', b'Zsz'),
                (b'hh\0Dd\0', b'Dhd'), (b'ss\0Dd\0', b'Zsd'),
                (b'ss\0hh\0Dd\0', b'Zs'), (first, b'Dh'),
                (b'r\0r\0Kk\0', b'K'), (b'x\0Kk\0', b'Kk'),
                (b'x\0x\0Zz\0', b'Z'), (b'x\0Dd\0Kk\0', b'Dd')):
            self.check(want, qr.spawn_report, output)

    K, Z, D = b'K1 accepted\n', b'Z1 died\n', b'D1 failed\n'
    TWICE = qr.DIED_LATE % b'192.0.2.1'

    def test_verdicts(self):
        """Letters of the recipient reports, the message report: a letter
        for each recipient, - for once more, alone."""
        for letters, text, count, want in (
                # by himself: the same as qmail-rspawn says
                ('r', self.K, 1, 'K'), ('h', self.K, 1, 'D'),
                ('s', self.Z, 1, 'Z'), ('r', self.D, 1, 'D'),
                ('', self.D, 1, 'D'), ('r', self.Z, 1, 'Z'),
                ('r', self.TWICE, 1, 'Z'),
                # who has got it, has got it; a refusal may come of the others
                ('rrr', self.K, 3, 'KKK'), ('rhr', self.K, 3, 'K-K'),
                ('rsr', self.K, 3, 'K-K'), ('hr', self.K, 2, 'DK'),
                ('sr', self.K, 2, 'ZK'), ('rhs', self.K, 3, 'K--'),
                # nobody
                ('hhh', self.D, 3, 'D--'), ('sss', self.Z, 3, 'ZZZ'),
                ('shs', self.Z, 3, 'Z-Z'), ('hs', self.Z, 2, 'DZ'),
                # the message refused, the line lost
                ('rrr', self.D, 3, '---'), ('rrr', self.Z, 3, '---'),
                ('r', self.Z, 3, '---'), ('', self.Z, 3, '---'),
                ('s', self.Z, 3, 'Z--'), ('rh', self.D, 2, '--'),
                # who may have got it must not get it twice
                ('rrr', self.TWICE, 3, 'ZZZ'), ('rsr', self.TWICE, 3, 'Z-Z'),
                ('r', self.TWICE, 3, 'Z--')):
            reports = [{'r': b'r', 'h': b'hno\n', 's': b'snot now\n'}[letter]
                       for letter in letters]
            texts = qr.verdicts(self.told(text, reports), count)
            self.assertEqual(want, ''.join(
                each[:1].decode() or '-' for each in texts),
                (letters, text, count))

    @staticmethod
    def told(text, reports):
        """The Result of a server that knows the recipients."""
        result = qr.Result(text, reports)
        result.rcpt_sent = True
        return result

    def test_verdicts_before_anybody_was_told(self):
        """What holds for one holds for all."""
        for text in qr.NO_CONTROL, qr.BAD_SENDER, qr.DNS_TEMPORARY:
            self.assertEqual([text] * 3, qr.verdicts(qr.Result(text), 3))
        self.assertEqual(
            [b'D' + qr.BAD_RECIPIENT[1:] + qr.NO_RECIPIENT[1:]] * 2,
            qr.verdicts(qr.Result(qr.NO_RECIPIENT,
                                  [qr.BAD_RECIPIENT] * 2), 2))

    def test_whether_somebody_was_told(self):
        """Of the recipients: with MAIL, or after it; and what one server
        has heard, the next one does not take back."""
        refused = 'S: 550 no\nQ:\n'
        pipelined = ('S: 220 fake\nC: EHLO me.example\nS: 250-fake\n'
                     'S: 250 PIPELINING\n' + MAIL + RCPT + 'C: DATA\n' +
                     refused)
        for before, script, after in (
                (False, TO_MAIL + refused, False), (False, pipelined, True),
                (False, 'S: 550 no\nQ:\n', False),
                (True, TO_MAIL + refused, True), (True, pipelined, True),
                (False, TO_RCPT + refused, True)):
            envelope = qr.Envelope(SENDER.encode(),
                                   [RECIPIENTS[0].encode()])
            with FakeSMTP(script) as server, self.subTest(script):
                context = context_of(
                    tcpto=qr.TcpTo(b'/nonexistent', time.time, 1, qr.wait),
                    connection=qr.Connection, message=None,
                    tls_control=lambda name: qr.TlsControl(
                        None, False, None, b''),
                    connect=lambda address, port, seconds: qr.connect(
                        IP.encode(), server.port, seconds))
                def attempt(server):
                    if server.port == 24:
                        result = qr.Result(b'Z', try_next=True)
                        result.rcpt_sent = before
                        return result
                    return qr.ServerTry(server, value_of(qr.Route), envelope,
                                        control_files(), context).run()
                result = qr.try_servers(
                    [qr.Server(IP.encode(), port, b'', qr.NO_TLSA, [])
                     for port in (24, 25)], attempt)
            self.assertEqual(after, result.rcpt_sent)

    def test_frames(self):
        parts = [b'1/2', b'', b'h', b'r@h']
        whole = qr.frame(parts)
        for end in range(len(whole)):
            self.assertEqual([], qr.unframe(whole[:end], 99))
        self.assertEqual(parts, qr.unframe(whole, 99))
        for bad, most in ((whole + b'x', 99), (whole, len(whole) - 5),
                          (b'\xff\xff\xff\xff', 99)):
            self.assertRaises(qr.WorkerFailed, qr.unframe, bad, most)

    def test_answers(self):
        """What a worker may say of one delivery, and of two."""
        for texts, good in (([b'Kx'], 1), ([b'Zx'], 1), ([b'D'], 1),
                            ([b''], 0), ([b'x'], 0), ([b'rx'], 0),
                            ([b'Kx', b''], 2), ([b'', b''], 2), ([], 0),
                            ([b'K', b'x'], 0), ([b'K'] * 3, 3)):
            for count in 1, 2:
                self.assertEqual(good == count, qr.is_valid_answer(
                    texts, [None] * count), texts)

    def add(self, batches, *deliveries, limit=50):
        for command in qr.CommandReader().take(commands(*deliveries)):
            batches.add(command, limit)

    @staticmethod
    def sizes(batches):
        """Of the ready batches, and of the open ones."""
        return (list(map(len, batches.ready)),
                [len(batch) for _, batch in batches.open.values()])

    def test_gathering(self):
        """Five milliseconds after the first, and not more; at once after
        the fiftieth, and when another message begins."""
        clock = VirtualClock()
        batches, start = qr.Batches(clock), clock.now
        self.assertEqual(float('inf'), batches.deadline())
        self.add(batches, (0, b'a@h'))
        self.assertEqual(start + .005, batches.deadline())
        clock.now += .004
        self.add(batches, (1, b'b@h'))
        self.assertEqual(start + .005, batches.deadline())
        batches.close_due()
        self.assertEqual(([], [2]), self.sizes(batches))
        self.add(batches, (2, b'c@h', b's@x.example', b'0/18'))
        self.assertEqual(([2], [1]), self.sizes(batches))
        self.add(batches, *[(3, b'%d@h' % i, b's@x.example', b'0/18')
                            for i in range(60)])
        self.assertEqual(([2, 50], [11]), self.sizes(batches))
        clock.now += .005
        batches.close_due()
        self.assertEqual(([2, 50, 11], []), self.sizes(batches))

    def test_who_goes_together(self):
        for other, together in (
                ((1, b'b@h'), True), ((1, b'b@H'), True),
                ((1, b'a@h'), True), ((1, b'b@i'), False),
                ((1, b'b@h', b'other@x'), False),
                ((1, b'b@h', b's@x.example', b'0/18'), False),
                ((1, b'\xc3\xa4@h'), False)):
            batches = qr.Batches(VirtualClock())
            self.add(batches, (0, b'a@h'), other)
            self.assertEqual(1 if together else 2,
                             len(sum(self.sizes(batches), [])), other)

    def test_batch_off(self):
        batches = qr.Batches(VirtualClock())
        self.add(batches, (0, b'a@h'), (1, b'b@h'), limit=1)
        self.assertEqual(([1, 1], []), self.sizes(batches))

    def spawner(self, *batch):
        """A Spawner with a worker that has a batch of these deliveries, the
        worker, its process, and its end of the socket pair."""
        clock = VirtualClock()
        spawner = qr.Spawner(20, os.getuid(), clock.wait, clock)
        return (spawner,) + self.worker(spawner.pool, *batch)

    def worker(self, pool, *batch):
        near, far = socket.socketpair()
        near.setblocking(False)
        child = subprocess.Popen(['sleep', '60'])
        for cleanup in far.close, near.close, child.wait, child.kill:
            self.addCleanup(cleanup)
        worker = qr.Worker(child.pid, near, pool.config)
        pool.workers[near.fileno()] = worker
        worker.batch = qr.CommandReader().take(commands(*batch))
        if not batch:
            pool.idle.append(worker)
        return worker, child, far

    def test_idle_workers_end(self):
        """After a minute, the oldest first."""
        clock = VirtualClock()
        pool, ends = qr.WorkerPool(os.getuid(), clock), []
        for since in 0, 30:
            worker, _, far = self.worker(pool)
            worker.idle_since = clock.now + since
            ends.append(far)
        self.assertEqual(clock.now + 60, pool.deadline(False))
        clock.now += 59.9
        pool.close_idle()
        self.assertEqual(2, len(pool.workers))
        clock.now += .2
        pool.close_idle()
        self.assertEqual(1, len(pool.idle))
        self.assertEqual(b'', ends[0].recv(1))
        pool.close_worker(pool.idle.pop())
        self.assertEqual({}, pool.workers)

    def answer(self, spawner):
        """Takes what there is of the answers of all workers."""
        for answer in spawner.pool.exchange(list(spawner.pool.workers), ()):
            spawner.take_answer(*answer)

    def test_nonsense_from_a_worker(self):
        """It is killed; its own deliveries are deferred, no others'."""
        for said in (b'\0\0\0\2KxKx', b'\xff\xff\xff\xff', b'\0\0\0\1x',
                     qr.frame([b'K', b'K', b'K']), qr.frame([b'K']),
                     qr.frame([b'K', b'x']), None):
            with self.subTest(said):
                spawner, _, child, far = self.spawner((4, b'a@h'),
                                                      (9, b'b@h'))
                spawner.busy = {4, 9, 11}
                if said is None:
                    far.close()
                else:
                    far.sendall(said)
                self.answer(spawner)
                self.assertEqual(-signal.SIGKILL, child.wait(10))
                self.assertEqual(b'\x14\4' + qr.SPAWN_CRASHED + b'\0\t' +
                                 qr.SPAWN_CRASHED + b'\0',
                                 spawner.reports.output)
                self.assertEqual({11}, spawner.busy)
                self.assertEqual({}, spawner.pool.workers)

    def test_a_word_from_an_idle_worker(self):
        spawner, _, child, far = self.spawner()
        far.sendall(b'\0')
        self.answer(spawner)
        self.assertEqual(-signal.SIGKILL, child.wait(10))
        self.assertEqual(([], {}), (spawner.pool.idle, spawner.pool.workers))

    def test_a_worker_with_old_control_files(self):
        """It finishes its job, and gets no other one."""
        spawner, _, _, far = self.spawner((4, b'a@h'))
        spawner.pool.config = qr.unusable_config(b'Z')
        far.sendall(qr.frame([b'Kx']))
        self.answer(spawner)
        self.assertEqual(b'\x14\4Kx\0', spawner.reports.output)
        self.assertEqual(([], {}), (spawner.pool.idle, spawner.pool.workers))
        self.assertEqual(b'', far.recv(1))

    def test_answer_in_pieces(self):
        """Nothing happens before the last byte; then one delivery is over,
        and the other one goes alone."""
        spawner, worker, _, far = self.spawner((4, b'a@h'), (9, b'b@h'))
        spawner.busy = {4, 9}
        whole = qr.frame([b'Kx', b''])
        for end in range(len(whole)):
            self.assertEqual(({4, 9}, 2), (spawner.busy, len(worker.batch)))
            far.sendall(whole[end:end + 1])
            self.answer(spawner)
        self.assertEqual(({9}, b'\x14\4Kx\0', [], [worker]), (
            spawner.busy, spawner.reports.output, worker.batch,
            spawner.pool.idle))
        self.assertEqual([[9]], [[command.delnum for command in batch]
                                 for batch in spawner.batches.ready])


class Office:
    """A mail server for many at once, on 127.0.0.1.  A recipient's local
    part says what becomes of it: no... 550, later... 451, spam... 554 to the
    message, gone... the line is lost after the message was taken, dead...
    the same before it; slow... waits a little; wait... waits until
    .release() is called.  most: no session takes more recipients, it says
    452.  sessions: the recipients accepted in each that began MAIL; got:
    recipients of messages taken."""

    def __init__(self, most=999, hello=(b'PIPELINING',)):
        self.most, self.hello = most, hello
        self.sessions, self.got = [], []
        self.waiting, self.gate = 0, threading.Event()
        self.listener = socket.socket()
        self.listener.bind((IP, 0))
        self.listener.listen(300)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def release(self):
        self.gate.set()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                sock = self.listener.accept()[0]
                threading.Thread(target=self.serve, args=(sock,),
                                 daemon=True).start()

    def serve(self, sock):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError, ValueError), sock, \
                sock.makefile('rb') as lines:
            self.session(sock, lines)

    def session(self, sock, lines):
        names = []

        def say(text):
            sock.sendall(text + b'\r\n')
        say(b'220 office')
        for line in lines:
            word, name = line[:4].upper(), line.partition(b'<')[2].partition(
                b'@')[0]
            if word == b'EHLO':
                for keyword in self.hello:
                    say(b'250-' + keyword)
                say(b'250 office')
            elif word == b'MAIL':
                self.sessions.append(names)
                say(b'250 ok')
            elif word == b'RCPT':
                code = b'550 no' if name.startswith(b'no') else \
                    b'451 later' if name.startswith(b'later') else \
                    b'452 enough' if len(names) >= self.most else b'250 ok'
                if code[:1] == b'2':
                    names.append(name)
                say(code)
            elif word == b'DATA':
                say(b'354 go' if names else b'503 nobody')
                if names or lines.readline() != b'QUIT\r\n':
                    self.message(sock, lines, names, say)
                return
            else:
                say(b'500 what')

    def message(self, sock, lines, names, say):
        def any_name(start):
            return any(name.startswith(start) for name in names)
        for line in lines:
            if line == b'.\r\n':
                break
        if any_name(b'dead'):
            return
        if any_name(b'wait'):
            self.waiting += 1
            self.gate.wait(20)
        if any_name(b'slow'):
            time.sleep(.05)
        if any_name(b'spam'):
            say(b'554 spam')
            return
        self.got += names
        if not any_name(b'gone'):
            say(b'250 taken')

    def close(self):
        self.release()
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


class QmailSend:
    """A scripted qmail-send: the program under the name qmail-rspawn on one
    end of a socket pair, us on the other, in a home with the message 0/17.
    office (anything with a port) is where all mail goes; program is one
    that can be executed under that name, if not this; by_sh: child is the
    sh of the first lines, as under qmail."""

    def __init__(self, office=None, limit=None, preexec_fn=None,
                 program=None, message=MESSAGE, by_sh=False, dns='127.0.0.1:1',
                 **control):
        self.home = Home(**control)
        os.chmod(self.home.path, 0o755)
        if office:
            self.home.write('smtproutes', b':127.0.0.1:%d' % office.port)
        if limit:
            self.home.write('concurrencyspawn', b'%d' % limit)
        self.mess = os.path.join(self.home.path, 'queue', 'mess', '0')
        os.makedirs(self.mess)
        with open(os.path.join(self.mess, '17'), 'wb') as f:
            f.write(message)
        command = [os.path.join(self.home.path, 'qmail-rspawn')]
        if program:
            os.symlink(program, command[0])
        else:
            shutil.copy(PROGRAM, command[0])
            command[:0] = ['sh'] if by_sh else [sys.executable, '-IS']
        if by_sh:
            os.symlink(sys.executable,
                       os.path.join(self.home.path, 'python3'))
        self.sock, far = socket.socketpair()
        self.sock.settimeout(20)
        for sock in self.sock, far:     # a pipe has no more
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        with far:
            self.child = subprocess.Popen(
                command, stdin=far, stdout=far, stderr=subprocess.DEVNULL,
                preexec_fn=preexec_fn, env={
                    'QMAILHOME': self.home.path, 'DNSCACHEIP': dns,
                    'PATH': self.home.path + ':/usr/bin:/bin'})
        self.left = b''
        self.first = self.sock.recv(1)

    def send(self, *deliveries):
        self.sock.sendall(commands(*deliveries))

    def reports(self, count):
        """[(delnum, text)] of the next so many."""
        found = []
        while len(found) < count:
            end = self.left.find(b'\0', 1)
            if end < 0:
                data = self.sock.recv(65536)
                if not data:
                    raise AssertionError('ended after %r' % found)
                self.left += data
                continue
            found.append((self.left[0], self.left[1:end]))
            self.left = self.left[end + 1:]
        return found

    def deliver(self, recipient, messid=b'0/17'):
        """The report of a delivery alone."""
        self.send((0, recipient, b's@x', messid))
        (delnum, text), = self.reports(1)
        if delnum:
            raise AssertionError('delivery %d' % delnum)
        return text

    def at_hand(self):
        """The reports that have come already."""
        self.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            self.left += self.sock.recv(65536)
        self.sock.settimeout(20)
        count = 0
        at = self.left.find(b'\0', 1)
        while at >= 0:
            count, at = count + 1, self.left.find(b'\0', at + 2)
        return self.reports(count)

    def letters(self, count):
        """{delnum: letter} of the next so many reports."""
        found = self.reports(count)
        letters = {delnum: text[:1].decode() for delnum, text in found}
        if len(letters) < count:
            raise AssertionError('one delivery twice: %r' % found)
        return letters

    def end(self):
        """End of input; (what else it says, its status)."""
        self.sock.shutdown(socket.SHUT_WR)
        rest = self.left
        while True:
            data = self.sock.recv(65536)
            if not data:
                return rest, self.child.wait(10)
            rest += data

    def workers(self):
        return children_of(self.child.pid)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sock.close()
        try:
            self.child.wait(10)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self.home.__exit__()


class Spawn(unittest.TestCase):
    """The process under the name qmail-rspawn, as qmail-send sees it."""

    TAKEN = b'K127.0.0.1 accepted message.\nRemote host said: 250 taken\n'

    def office(self, **options):
        office = Office(**options)
        self.addCleanup(office.close)
        return office

    def wait_for(self, true, what):
        end = time.monotonic() + 15
        while not true():
            self.assertLess(time.monotonic(), end, what)
            time.sleep(.01)

    def test_first_byte(self):
        for data, want in ((None, 120), (b'20', 20), (b'1', 1), (b'0', 1),
                           (b'255', 255), (b'256', 255), (b'many', 120)):
            with QmailSend(concurrencyspawn=data) as qmail:
                self.assertEqual((bytes((want,)), (b'', 0)),
                                 (qmail.first, qmail.end()), data)

    def test_modules_are_loaded(self):
        """A worker finds all of them in memory, for the Python on the disk
        may have changed: TLS with a check, CRAM-MD5, A-labels, DANE."""
        code = (
            'import sys\nsys.path.insert(0, %r)\nimport qmail_remote as qr\n'
            'qr.load_modules()\n'
            'qr.read_worker_config(qr.trust_store())\n'
            'before = set(sys.modules)\n'
            'plain = qr.TlsControl(None, False, None, b"")\n'
            'import ssl\n'
            'for level in qr.TlsPolicy.IF_OFFERED, qr.TlsPolicy.SYSTEM:\n'
            '    policy = qr.TlsPolicy(level, None)\n'
            '    layer = qr.TlsLayer(qr.tls_context(policy, plain), b"x.y")\n'
            '    layer.handshake()\n'
            'qr.tls_context(qr.TlsPolicy(qr.TlsPolicy.FILE, %r), plain)\n'
            'qr.hmac_md5(b"a", b"b"), qr.unbase64(b"YQ==")\n'
            'qr.to_wire("\u00e4".encode("utf-8"))\n'
            'for matching in 1, 2:\n'
            '    qr.dane_match((3, 0, matching, b""), b"")\n'
            'qr.can_show_chain()\n'
            'print(sorted(set(sys.modules) - before))\n') % (
                HERE, PEM['relay'].encode())
        with Home() as home:
            done = subprocess.run(
                [sys.executable, '-ISB', '-c', code], cwd=home.path,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertEqual((b'[]\n', b''), (done.stdout, done.stderr))

    def test_contexts_are_made_ahead(self):
        """Whatever tlshosts and notlshosts hold."""
        for files in {}, {'tlshosts/x': b'', 'notlshosts/x': b''}:
            with Home(**files) as home, inside(home):
                self.assertEqual(
                    2, len(qr.read_worker_config(
                        []).tls_cache.contexts))

    def test_the_name_server_that_answered(self):
        """A worker asks it first, in all that it delivers."""
        office, zone = self.office(), {('relay.test', 'A'): [IP]}
        with FakeDNS(zone, {('*', '*'): {'rcode': 2}}) as bad, \
                FakeDNS(zone) as good, QmailSend(
                    limit=1, dns='%s %s' % (bad.dns, good.dns),
                    smtproutes=b':relay.test:%d' % office.port) as qmail:
            asked = []
            for _ in range(3):
                self.assertEqual(self.TAKEN, qmail.deliver(b'r@c.example'))
                asked.append((len(bad.queries), len(good.queries)))
        self.assertEqual([(3, 3), (3, 6), (3, 9)], asked)

    def test_unreadable_concurrencyspawn(self):
        """It runs, and says what is wrong with each delivery."""
        office, bad = self.office(), NO_CONTROL.encode()
        for name, data in (('concurrencyspawn', b'\xef\xbb\xbf20'),
                           ('concurrencyspawn/x', b'')):
            with self.subTest(name), \
                    QmailSend(office, **{name: data}) as qmail:
                self.assertEqual(b'\x78', qmail.first)
                for _ in range(2):
                    self.assertEqual(bad, qmail.deliver(b'a@h'))
                path = os.path.join(qmail.home.path, 'control',
                                    'concurrencyspawn')
                os.rename(path, path + '.bad')
                self.assertEqual(self.TAKEN, qmail.deliver(b'a@h'))
                os.symlink('nowhere', path)
                self.assertEqual(bad, qmail.deliver(b'a@h'))
                self.assertEqual((b'', 0), qmail.end())

    def test_by_sh(self):
        """As qmail-start runs it, by the lines of sh at the top; tcpto is
        cleared; and without a home."""
        with Home() as home:
            os.makedirs(os.path.join(home.path, 'queue', 'mess'))
            link, path = os.path.join(home.path, 'qmail-rspawn'), \
                bin_with_python3()
            self.addCleanup(shutil.rmtree, path)
            os.symlink(PROGRAM, link)

            def run(where):
                done = subprocess.run(
                    ['sh', link], env={'QMAILHOME': where, 'PATH':
                                       path + ':/usr/bin:/bin'},
                    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
                return done.returncode, done.stdout
            for size in 1024, 320, 0, 1025, 5000:
                with open(home.tcpto, 'wb') as f:
                    f.write(b'x' * size)
                self.assertEqual((0, b'x'), run(home.path))
                with open(home.tcpto, 'rb') as f:
                    self.assertEqual(bytes(1024) + b'x' * (size - 1024),
                                     f.read())
            os.unlink(home.tcpto)
            self.assertEqual((0, b'x'), run(home.path))
            self.assertFalse(os.path.exists(home.tcpto))
            self.assertEqual((111, b''), run('/none'))
            os.rmdir(os.path.join(home.path, 'queue', 'mess'))
            self.assertEqual((111, b''), run(home.path))

    def test_bad_commands(self):
        """Each with qmail's text, and without harm to what runs."""
        office = self.office()
        with QmailSend(office, limit=20) as qmail:
            os.mkdir(os.path.join(qmail.mess, '18'))
            os.mkfifo(os.path.join(qmail.mess, '19'))
            qmail.send((3, b'wait@h'))
            self.wait_for(lambda: office.waiting, 'no delivery')
            for delnum, messid, recipient, want in SpawnTables.BAD:
                if want is not None:
                    qmail.send((delnum, recipient, b's@x', messid))
                    self.assertEqual([(delnum, want)], qmail.reports(1))
            for messid, want in ((b'0/99', qr.SPAWN_NO_OPEN),
                                 (b'17', qr.SPAWN_NO_OPEN),
                                 (b'0/17/', qr.SPAWN_NO_OPEN),
                                 (b'0/18', qr.SPAWN_WRONG_TYPE),
                                 (b'0/19', qr.SPAWN_WRONG_TYPE)):
                qmail.send((0, b'r@h', b's@x', messid))
                self.assertEqual([(0, want)], qmail.reports(1), messid)
            if not os.getuid():
                os.chown(os.path.join(qmail.mess, '17'), 65534, -1)
                self.assertEqual(qr.SPAWN_WRONG_OWNER, qmail.deliver(b'r@h'))
            office.release()
            self.assertEqual([(3, self.TAKEN)], qmail.reports(1))
            self.assertEqual((b'', 0), qmail.end())

    def test_verdicts(self):
        """One by one, and each in a session of its own."""
        office = self.office()
        with QmailSend(office) as qmail:
            for name, want in (
                    (b'one', self.TAKEN),
                    (b'no', b'D127.0.0.1 does not like recipient.\nRemote '
                     b'host said: 550 no\nGiving up on 127.0.0.1.\n'),
                    (b'later', b'Z127.0.0.1 does not like recipient.\nRemote '
                     b'host said: 451 later\nGiving up on 127.0.0.1.\n'),
                    (b'spam', b'D127.0.0.1 failed after I sent the message.\n'
                     b'Remote host said: 554 spam\n'),
                    (b'dead', TWICE.encode()), (b'gone', TWICE.encode()),
                    (b'a\rb', b'D' + qr.BAD_RECIPIENT[1:] +
                     qr.NO_RECIPIENT[1:])):
                qmail.send((7, name + b'@h'))
                self.assertEqual([(7, want)], qmail.reports(1))
            self.assertEqual([[b'one'], [], [], [b'spam'], [b'dead'],
                              [b'gone']], office.sessions)
            qmail.home.write('smtproutes', b':relay:99999')
            qmail.send((7, b'one@h'))
            self.assertEqual([(7, NO_CONTROL.encode())], qmail.reports(1))

    def test_together(self):
        """Fifty in one session, in the order of the commands; each has his
        own verdict, and nobody gets it twice."""
        office = self.office()
        with QmailSend(office) as qmail:
            qmail.send(*[(i, b'r%d@h' % i) for i in range(120)])
            self.assertEqual({i: 'K' for i in range(120)},
                             qmail.letters(120))
            self.assertEqual([50, 50, 20],
                             sorted(map(len, office.sessions))[::-1])
            self.assertEqual(
                [b'r%d' % i for i in range(120)],
                sum(sorted(office.sessions,
                           key=lambda names: int(names[0][1:])), []))
            del office.got[:], office.sessions[:]
            qmail.send(*[(i, name + b'@h') for i, name in enumerate(
                (b'a', b'no1', b'b', b'later1', b'c', b'a\rb'))])
            self.assertEqual({0: 'K', 1: 'D', 2: 'K', 3: 'Z', 4: 'K', 5: 'D'},
                             qmail.letters(6))
        self.assertEqual([b'a', b'b', b'c'], sorted(office.got))
        self.assertEqual([[], [], [b'a', b'b', b'c']],
                         sorted(office.sessions))

    def test_what_one_of_them_spoils(self):
        """A message that is refused because of one of them, a line that is
        lost: the others go alone, and get it."""
        for bad, letter in ((b'spam', 'D'), (b'dead', 'Z'), (b'gone', 'Z')):
            office = self.office()
            with self.subTest(bad), QmailSend(office) as qmail:
                qmail.send((0, b'a@h'), (1, bad + b'@h'), (2, b'b@h'))
                got = qmail.letters(3)
                if letter == 'D':       # nothing has been taken: once more
                    self.assertEqual({0: 'K', 1: 'D', 2: 'K'}, got)
                    self.assertEqual([b'a', b'b'], sorted(office.got))
                else:                   # perhaps it has: not now
                    self.assertEqual({0: 'Z', 1: 'Z', 2: 'Z'}, got)
                    self.assertEqual(1, len(office.sessions))

    def test_size_of_a_session(self):
        """More than a server takes go in the next one; batch sets it."""
        for most, batch, sizes in ((3, None, [2, 3, 3]), (999, b'0', [1] * 8),
                                   (999, b'1', [1] * 8)):
            office = self.office(most=most)
            with QmailSend(office, batch=batch) as qmail:
                qmail.send(*[(i, b'r%d@h' % i) for i in range(8)])
                self.assertEqual({i: 'K' for i in range(8)},
                                 qmail.letters(8))
            if batch:
                self.assertEqual(sizes, list(map(len, office.sessions)))
            self.assertEqual([b'r%d' % i for i in range(8)],
                             sorted(office.got))

    def test_255_at_once(self):
        office = self.office()
        with QmailSend(office, limit=255, batch=b'0') as qmail:
            self.assertEqual(b'\xff', qmail.first)
            qmail.send(*[(i, b'wait%d@h' % i) for i in range(255)])
            qmail.send((254, b'again@h'), (255, b'more@h'))
            self.assertEqual([(254, qr.SPAWN_IN_USE),
                              (255, qr.SPAWN_TOO_BIG)], qmail.reports(2))
            self.wait_for(lambda: office.waiting == 255, 'not all at once')
            office.release()
            self.assertEqual({i: 'K' for i in range(255)},
                             qmail.letters(255))
            self.assertEqual((b'', 0), qmail.end())
        self.assertEqual(255, len(set(office.got)))

    def test_killed_workers(self):
        """A killed one defers its own deliveries; the next one is born when
        it is needed."""
        office = self.office()
        with QmailSend(office) as qmail:
            if not qmail.workers():
                qmail.send((9, b'first@h'))
                qmail.reports(1)
            if not qmail.workers():
                self.skipTest('no /proc')
            before = set(qmail.workers())
            qmail.send((0, b'wait0@h'), (1, b'wait1@h'))
            self.wait_for(lambda: office.waiting == 1, 'no delivery')
            qmail.send((2, b'wait2@other'))
            self.wait_for(lambda: office.waiting == 2, 'no delivery')
            first, = before
            os.kill(first, signal.SIGKILL)
            self.assertEqual([(0, qr.SPAWN_CRASHED), (1, qr.SPAWN_CRASHED)],
                             sorted(qmail.reports(2)))
            self.assertEqual(self.TAKEN, qmail.deliver(b'next@h'))
            office.release()
            self.assertEqual([(2, self.TAKEN)], qmail.reports(1))
            idle = qmail.workers()
            for worker in idle:
                os.kill(worker, signal.SIGKILL)
            self.wait_for(lambda: not any(map(runs, idle)), 'not killed')
            self.assertEqual(self.TAKEN, qmail.deliver(b'last@h'))
            self.assertEqual((b'', 0), qmail.end())

    def test_killed_spawner(self):
        """Its workers notice within seconds, and leave."""
        office = self.office()
        with QmailSend(office) as qmail:
            qmail.send((0, b'idle@h'))
            qmail.reports(1)
            workers = qmail.workers()
            qmail.child.kill()
            qmail.child.wait()
            self.wait_for(lambda: not any(map(runs, workers)), workers)

    def test_killed_sh(self):
        """It is what ps shows, and what is killed: no command is taken from
        then on, what is under way is finished and reported, and qmail-send
        sees the end."""
        office = self.office()
        with QmailSend(office, by_sh=True, timeoutremote=b'30') as busy, \
                QmailSend(by_sh=True) as idle:
            pythons = busy.workers() + idle.workers()
            if not pythons:
                self.skipTest('no /proc')
            busy.send((0, b'wait@h'))
            self.wait_for(lambda: office.waiting, 'no delivery')
            for qmail in busy, idle:
                qmail.child.terminate()
                qmail.child.wait()
            self.assertEqual(b'', idle.sock.recv(1))
            time.sleep(1)
            busy.send((1, b'late@h'))
            office.release()
            self.assertEqual([(0, self.TAKEN)], busy.reports(1))
            with contextlib.suppress(ConnectionResetError):  # late@h: unread
                self.assertEqual(b'', busy.sock.recv(1))
            self.wait_for(lambda: not any(map(runs, pythons)), 'Python stays')
        self.assertEqual([b'wait'], office.got)

    def test_no_fork_while_others_are_busy(self):
        """What cannot have a worker of its own waits for one."""
        office = self.office()
        with QmailSend(office, batch=b'0') as qmail:
            if not hasattr(resource, 'prlimit'):
                self.skipTest('no prlimit')
            qmail.send((0, b'wait0@h'))
            self.wait_for(lambda: office.waiting, 'no delivery')
            resource.prlimit(qmail.child.pid, resource.RLIMIT_NOFILE, (4, 4))
            qmail.send(*[(i, b'r%d@h' % i) for i in range(1, 9)])
            before = seconds_of([qmail.child.pid])
            time.sleep(1)
            self.assertLess(seconds_of([qmail.child.pid]) - before, .3)
            self.assertEqual([], qmail.at_hand())
            office.release()
            self.assertEqual({i: 'K' for i in range(9)}, qmail.letters(9))
            self.assertEqual((b'', 0), qmail.end())
        self.assertEqual(9, len(office.got))

    def test_descriptors(self):
        """A worker holds its own, and nobody else's."""
        if not os.path.isdir('/proc/self/fd'):
            self.skipTest('no /proc')
        office = self.office()
        with QmailSend(office, batch=b'0') as qmail:
            qmail.send(*[(i, b'wait%d@h' % i) for i in range(10)])
            self.wait_for(lambda: office.waiting == 10, 'no delivery')
            for worker in qmail.workers():
                links = [os.readlink('/proc/%d/fd/%d' % (worker, fd))
                         for fd in range(3)]
                self.assertEqual(['/dev/null'] * 3, links)
                rest = [os.readlink('/proc/%d/fd/%s' % (worker, fd)) for fd
                        in os.listdir('/proc/%d/fd' % worker) if int(fd) > 2]
                rest = [link.split(':')[0] for link in rest
                        if 'urandom' not in link]
                self.assertEqual(['socket', 'socket',
                                  os.path.join(qmail.mess, '17')],
                                 sorted(rest, key=lambda link: link[0] == '/'))
            office.release()
            qmail.reports(10)
            self.assertEqual((b'', 0), qmail.end())

    def test_workers_are_replaced(self):
        """After 200 deliveries, and when a control file has changed."""
        office, other = self.office(), self.office()
        with QmailSend(office, batch=b'0') as qmail:
            seen = []

            def deliver(messid=b'0/99'):
                qmail.send((0, b'r@h', b's@x', messid))
                qmail.reports(1)
                seen.append(tuple(qmail.workers()))
            for _ in range(201):
                deliver()
            if not any(seen):
                self.skipTest('no /proc')
            self.assertEqual(1, len(set(seen[:199])))
            self.assertNotEqual(seen[0], seen[200])
            deliver(b'0/17')
            qmail.home.write('smtproutes', b':127.0.0.1:%d' % other.port)
            deliver(b'0/17')
            self.assertNotEqual(seen[-1], seen[-2])
            self.assertEqual((1, 1), (len(office.got), len(other.got)))

    def test_end_of_input(self):
        """Nothing is left undone, and half a command is no command."""
        for state, send, count in (
                ('idle', b'', 0), ('in a command', b'\0' b'0/17\0s@x\0r@', 0),
                ('gathering', commands((0, b'a@h'), (1, b'b@h')), 2),
                ('in delivery', commands((0, b'slow@h')), 1),
                ('both', commands((0, b'slow@h'), (1, b'b@i')) + b'\0020',
                 2)):
            office = self.office()
            with self.subTest(state), QmailSend(office) as qmail:
                qmail.sock.sendall(send)
                if state == 'in delivery':
                    self.wait_for(lambda: office.sessions, 'no delivery')
                rest, status = qmail.end()
                self.assertEqual((count, 0), (rest.count(self.TAKEN), status))
                self.assertEqual(count, len(office.got))

    def test_a_reader_that_sleeps(self):
        """Reports pile up, and then no more commands are taken: nothing is
        lost, and memory does not grow."""
        office = self.office()
        with QmailSend(office) as qmail:
            count = 60000
            flood = commands((0, b'a@h')) + \
                commands((250, b'b@h')) * count
            sender = threading.Thread(target=qmail.sock.sendall,
                                      args=(flood,), daemon=True)
            sender.start()
            time.sleep(.5)
            self.assertTrue(sender.is_alive(), 'all of it was taken')
            found = qmail.reports(count + 1)
            sender.join(10)
            self.assertEqual([self.TAKEN], [text for delnum, text in found
                                            if delnum == 0])
            self.assertEqual({qr.SPAWN_TOO_BIG}, {
                text for delnum, text in found if delnum})
            self.assertEqual((b'', 0), qmail.end())

    def test_qmail_send_is_gone(self):
        """It finishes, and goes too."""
        office = self.office()
        with QmailSend(office) as qmail:
            qmail.send((0, b'slow@h'))
            self.wait_for(lambda: office.sessions, 'no delivery')
            qmail.sock.close()
            self.assertEqual(0, qmail.child.wait(10))
        self.assertEqual([b'slow'], office.got)

    def test_no_memory_for_new_control_files(self):
        """Deferrals, and it goes on when there is some again."""
        office = self.office()
        with QmailSend(office) as qmail:
            if not hasattr(resource, 'prlimit'):
                self.skipTest('no prlimit')
            self.assertEqual(self.TAKEN, qmail.deliver(b'a@h'))
            limits = resource.prlimit(qmail.child.pid,
                                      resource.RLIMIT_NOFILE)
            resource.prlimit(qmail.child.pid, resource.RLIMIT_NOFILE,
                             (1, limits[1]))
            qmail.home.write('timeoutremote', b'7')
            qmail.send((0, b'a@h'))
            self.assertEqual([b'Z'], [text[:1] for _, text
                                      in qmail.reports(1)])
            resource.prlimit(qmail.child.pid, resource.RLIMIT_NOFILE, limits)
            self.assertEqual(self.TAKEN, qmail.deliver(b'a@h'))
            self.assertEqual((b'', 0), qmail.end())

    def test_no_pipe(self):
        with QmailSend() as qmail:
            try:
                resource.prlimit(qmail.child.pid, resource.RLIMIT_NOFILE,
                                 (4, 4))
            except (AttributeError, OSError):
                self.skipTest('no prlimit')
            qmail.send((0, b'a@h'), (1, b'b@i'))
            self.assertEqual([(0, qr.SPAWN_NO_PIPE), (1, qr.SPAWN_NO_PIPE)],
                             sorted(qmail.reports(2)))
            self.assertEqual((b'', 0), qmail.end())

    def test_no_fork(self):
        """A user who may have no process more; root always may."""
        if os.getuid():
            self.skipTest('takes root')

        def lone_user():
            os.setgid(64999)
            os.setuid(64999)
            resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        try:
            with QmailSend(preexec_fn=lone_user) as qmail:
                self.assertEqual(qr.SPAWN_NO_FORK, qmail.deliver(b'a@h'))
                self.assertEqual((b'', 0), qmail.end())
        except PermissionError:
            self.skipTest('this Python is for root alone')

    def test_under_fire(self):
        """Random commands, faults, and killed workers: each delivery gets
        one report, K means that the server has it, and what the server has
        without a K is called a possible duplicate, or crashed."""
        chance = random.Random(int.from_bytes(os.urandom(4), 'big'))
        office = self.office(most=4)
        with QmailSend(office) as qmail:
            names, reports, free = {}, {}, set(range(40))
            kinds = [b'r'] * 8 + [b'no', b'later', b'spam', b'dead', b'gone',
                                  b'slow']
            end = time.monotonic() + 1.5
            number = 0
            while time.monotonic() < end and number < 3000:
                for _ in range(chance.randrange(1, 12)):
                    if free:
                        delnum, number = free.pop(), number + 1
                        names[delnum] = b'%s%d' % (chance.choice(kinds),
                                                   number)
                        qmail.send((delnum, names[delnum] + b'@h%d' %
                                    chance.randrange(3)))
                if chance.random() < .1:
                    for worker in chance.sample(qmail.workers(), 1) \
                            if qmail.workers() else ():
                        os.kill(worker, signal.SIGKILL)
                while len(free) < 40 and (len(free) < 8 or
                                          chance.random() < .9):
                    (delnum, text), = qmail.reports(1)
                    self.assertNotIn(names[delnum], reports)
                    reports[names[delnum]] = text
                    free.add(delnum)
            for delnum, text in qmail.reports(40 - len(free)):
                reports[names[delnum]] = text
            self.assertEqual((b'', 0), qmail.end())
        self.assertEqual(number, len(reports))
        got = collections.Counter(office.got)
        for name, text in reports.items():
            unsure = b'Possible duplicate' in text or \
                text == qr.SPAWN_CRASHED
            if text[:1] == b'K':
                self.assertEqual(1, got[name], (name, text))
            elif not unsure:
                self.assertEqual(0, got[name], (name, text))
            else:
                self.assertLessEqual(got[name], 1, (name, text))
            if text[:1] == b'D':
                self.assertIn(name.rstrip(b'0123456789'), (b'no', b'spam'))
        self.assertGreater(sum(text[:1] == b'K'
                               for text in reports.values()), 20)


def sections(text):
    """{heading: its words} of a manual, as text."""
    found, heading = {}, None
    for line in text.split('\n'):
        if re.match('[A-Z][A-Z ]+$', line):
            heading = line.strip()
            found[heading] = []
        elif heading and line.startswith(' '):
            found[heading] += line.split()
    return found


class ManualPage(unittest.TestCase):
    """make qmail-remote.8"""

    maxDiff = None

    @classmethod
    def setUpClass(cls):
        cls.page = cls.make()

    @staticmethod
    def make(program='make', awk='awk'):
        """The page, made where the test file is not."""
        with tempfile.TemporaryDirectory() as place:
            for name in 'Makefile', 'qmail_remote.py':
                shutil.copy(os.path.join(HERE, name), place)
            subprocess.check_call(
                [find_program(program), '-s', 'qmail-remote.8', 'AWK=' + awk],
                cwd=place, timeout=30, env={'PATH': os.environ['PATH']})
            with open(os.path.join(place, 'qmail-remote.8'), 'rb') as f:
                return f.read()

    def test_any_tools(self):
        """It does not depend on make or awk."""
        self.assertEqual(self.page, self.make('bmake'))
        for awk in 'busybox awk', 'gawk', 'gawk --posix', 'original-awk':
            if shutil.which(awk.split()[0]):
                self.assertEqual(self.page, self.make(awk=awk), awk)

    def render(self, *command):
        """(what a program makes of the page, its complaints)."""
        find_program(command[0])
        done = subprocess.run(command, input=self.page, timeout=30,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return re.sub(b'.\b|\x1b\\[[0-9;]*m', b'', done.stdout), done.stderr

    def test_nothing_to_complain_of(self):
        self.assertEqual((b'', b''), self.render('mandoc', '-Tlint'))
        self.assertEqual((b'', b''),
                         self.render('groff', '-man', '-ww', '-z'))

    def test_nothing_is_lost(self):
        """Word for word, and examples line for line."""
        wanted = sections(MANUAL)
        self.assertEqual(['NAME', 'SYNOPSIS'], list(wanted)[:2])
        examples = [line.strip() for line in MANUAL.split('\n')
                    if line.startswith(12 * ' ')]
        for command in (['mandoc', '-Tascii'],
                        ['groff', '-man', '-Tascii', '-P-c', '-rHY=0',
                         '-rLL=78n']):
            with self.subTest(command):
                text = self.render(*command)[0].decode('ascii')
                self.assertEqual(wanted, sections(text))
                lines = [line.strip() for line in text.split('\n')]
                for line in examples:
                    self.assertIn(line, lines)

    def test_nothing_is_missing(self):
        """Every report, control file and environment variable is in it."""
        manual = ' '.join(MANUAL.split())
        with open(PROGRAM, encoding='utf-8') as f:
            program = f.read()
        room = program.split('4. Results\n')[1].split('\nclass ')[0]
        names = re.findall(r'^([A-Z][A-Z_0-9]+) = b', room, re.M)
        self.assertGreater(len(names), 35)
        for name in names:
            text = getattr(qr, name).decode()
            # One letter decides; ACCEPTED and those after it have none.
            text = re.sub('^[DZKh](?=[A-Zq%])', '', text)
            for part in re.split('%[sd]', text):
                self.assertIn(' '.join(part.split()), manual, name)
        for file in re.findall("b'control/([a-z.]+)'", program) + \
                re.findall(r"read\(b'([a-z]+)'\)", program):
            self.assertIn(file, manual)
        for variable in re.findall(r"environ\.get\(b'([A-Z_]+)'", program):
            self.assertIn(variable, manual)

    def test_order_of_reports(self):
        """The program's constants and the manual have one order."""
        with open(PROGRAM, encoding='utf-8') as f:
            room = f.read().split('4. Results\n')[1].split('\nclass ')[0]
        reports = ' '.join(MANUAL.split()).split(' REPORTS ')[1]
        found = [reports.index(max(
            (' '.join(part.split()) for part in re.split(
                '^[DZKhs](?=[A-Zq%])|%[sd]', getattr(qr, name).decode())),
            key=len)) for name in re.findall(r'^([A-Z_0-9]+) = b', room, re.M)
            if name not in ('TLS_GAVE_UP', 'TLS_IN_THE_CLEAR')]
        self.assertEqual(sorted(found), found)

    def test_times(self):
        """The formula gives the figures of its examples, and what bound()
        has for the tests of real processes."""
        times = re.search(r'(?ms)^TIMES\n(.*?)^[A-Z]', MANUAL).group(1)
        formula = re.search(r'(?m)^ {8}(D \+ .*)$', times).group(1)

        def most(**values):
            return eval(formula, dict({'T': 0, 'N': 1, 'P': 1, 'C': 60},
                                      **values))
        unreached = {'H': 0, 'N': -2, 'P': 0}    # and so no reply at all
        for line, values in (
                ('20 servers do not connect', dict(unreached, S=20)),
                ('1 server delays all it can', {'S': 1, 'H': 4}),
                ('20 such servers', {'S': 20, 'H': 4})):
            figures = re.search('%s +([0-9]+) s +([0-9]+) s' % line, times)
            self.assertEqual([int(figure) for figure in figures.groups()],
                             [most(D=2 * 2 * 5, R=R, **values)
                              for R in (1200, 600)])
        for values in ((1, 4, 1, 1, 5, 5, 0), (3, 11, 50, 7, 600, 60, 20)):
            S, H, N, P, R, C, D = values
            self.assertEqual(bound(*values) - 2, most(
                D=D, S=S, C=C, H=H, R=R, N=N, P=P))


class Readme(unittest.TestCase):
    """What README says, as far as it can be checked."""

    maxDiff = None

    @classmethod
    def setUpClass(cls):
        with open(os.path.join(HERE, 'README'), encoding='ascii') as f:
            cls.text = f.read()
        with open(PROGRAM, encoding='utf-8') as f:
            cls.lines = f.read().split('\n')
        body = ast.parse('\n'.join(cls.lines)).body
        cls.header = cls.last_line(body[0])
        cls.functions = list(cls.find_functions(body, ''))

    @staticmethod
    def last_line(node):
        """Before Python 3.8 a string has the number of its last line."""
        return max(getattr(inner, 'end_lineno', inner.lineno)
                   for inner in ast.walk(node) if hasattr(inner, 'lineno'))

    @classmethod
    def find_functions(cls, body, before):
        """(name, its class before it, and its first and last lines)."""
        for node in body:
            if isinstance(node, ast.ClassDef):
                yield from cls.find_functions(node.body, node.name + '.')
            elif isinstance(node, ast.FunctionDef):
                yield before + node.name, node.lineno, cls.last_line(node)

    def section(self, title):
        return re.search(r'(?ms)^\d+  %s\n(.*?)(?=^\d+  [A-Z]|\Z)' % title,
                         self.text).group(1)

    def place(self, number):
        """What has a line of the program."""
        if number <= self.header:
            return 'the header'
        for name, first, last in self.functions:
            if first <= number <= last:
                return name + '()'
        return 'the top level'

    def test_its_form(self):
        lines = self.text.split('\n')
        self.assertLessEqual(len(lines) - 1, 380)
        self.assertEqual([], [line for line in lines if len(line) > 72])
        self.assertIn(' %s ' % qr.VERSION, lines[0])
        self.assertTrue(self.section('CHANGES').lstrip().startswith(
            qr.VERSION + ':'))

    def test_greps(self):
        """Each command finds as many lines as README says, in the functions
        that it names."""
        audit = self.section('AUDITING IT')
        values = '\n'.join(re.findall(r'(?m)^    ([A-Z]=.*)$', audit)) + '\n'
        found = re.findall(r'(?m)^    (grep .*)\n((?: {8}\S.*\n)+)', audit)
        self.assertEqual(audit.count('\n    grep '), len(found))
        self.assertGreater(len(found), 12)
        for command, text in found:
            done = subprocess.run(
                ['/bin/sh', '-c', values + command], cwd=HERE, timeout=30,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            lines = done.stdout.decode().split('\n')[:-1]
            with self.subTest(command, lines=lines):
                self.assertEqual(re.match(r' *(\d+)', text).group(1),
                                 str(len(lines)))
                named = set(re.findall(r'[\w.]+\(\)', text))
                if 'the header' in ' '.join(text.split()):
                    named.add('the header')
                self.assertEqual(named, {
                    self.place(int(line.split(':')[0])) for line in lines})

    def test_calls(self):
        """One > another: it calls it.  All functions named are there."""
        sources = {name + '()': '\n'.join(self.lines[first - 1:last])
                   for name, first, last in self.functions}
        self.assertEqual([], [
            name for name in re.findall(r'[\w.]+\(\)', self.text)
            if name not in sources])
        calls = re.findall(r'([\w.]+\(\))(?= >\s+([\w.]+\(\)))', self.text)
        self.assertGreater(len(calls), 10)
        for caller, called in calls:
            self.assertRegex(sources[caller], r'\b%s\b' % re.escape(
                called.rpartition('.')[2][:-2]), caller)

    def test_sections(self):
        """Of the program; 2 and those that touch nothing are not listed."""
        program = re.findall(r'(?m)^# -+ (\d+)\. (.*)$',
                             '\n'.join(self.lines))
        listed = re.findall(r'(?m)^    ( ?\d+) (\w+(?: \w+)?)  ',
                            self.section('AUDITING IT'))
        self.assertGreater(len(listed), 8)
        for number, name in listed:
            self.assertIn((number.strip(), name), program)

    def test_reports(self):
        """Its list has texts of the manual, and of the classic program."""
        texts = re.findall(r'(?m)^(?! )(.*)\n    ',
                           self.section('IF IT DOES NOT WORK'))
        self.assertGreater(len(texts), 12)
        manual = ' '.join(MANUAL.split())
        self.assertEqual(['Unable to run qmail-remote.'], [
            text for text in texts if text not in manual])

    def test_commands(self):
        """Its make commands exist."""
        with open(os.path.join(HERE, 'Makefile')) as f:
            targets = re.findall(r'(?m)^([a-z.8-]+):', f.read())
        named = re.findall(r'(?m)^    make ([a-z.8-]+)', self.text)
        self.assertGreater(len(named), 8)
        for target in named:
            self.assertIn(target, targets)


def anybody(*command, **options):
    """The exit status of a command; if we are root, of a user who has no
    rights, as it is with qmailr."""
    def become():
        if not os.getuid():
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
    try:
        return subprocess.call(command, preexec_fn=become, **options)
    except (OSError, subprocess.SubprocessError):
        return 126


class InQmail(unittest.TestCase):
    """make install, install-qmail, install-qmail-rspawn, uninstall: in a
    qmail home in a temporary directory."""

    @classmethod
    def setUpClass(cls):
        for cls.python in sys.executable, '/usr/bin/python3':
            if anybody(cls.python, '-ISc', '') == 0:
                return
        raise unittest.SkipTest('every Python here is for root alone')

    def setUp(self):
        self.top = os.path.realpath(tempfile.mkdtemp(prefix='qmail-'))
        self.addCleanup(shutil.rmtree, self.top)
        os.chmod(self.top, 0o755)
        if anybody('/bin/sh', '-c', 'cd "$0"', self.top,
                   stderr=subprocess.DEVNULL):
            self.skipTest('TMPDIR is for root alone')
        # The test file is not there: nothing is made from it.
        self.source = self.path('source')
        self.home, self.prefix = self.path('home'), self.path('prefix')
        for name in ('source', 'home/bin', 'home/control', 'prefix',
                     'home/queue/mess', 'home/queue/lock', 'tools'):
            os.makedirs(self.path(name), 0o755)
        for name in 'Makefile', 'qmail_remote.py', 'README', 'LICENSE':
            shutil.copy(os.path.join(HERE, name), self.source)
        self.write('home/control/me', ME)
        self.old = {}
        for name in 'qmail-remote', 'qmail-rspawn':
            self.old[name] = b'the old ' + name.encode()
            self.write('home/bin/' + name, self.old[name], 0o711)
        self.library = self.path('prefix/lib/qmail-remote')
        self.installed = os.path.join(self.library, 'qmail_remote.py')

    def path(self, name):
        return os.path.join(self.top, name)

    def write(self, name, data, mode=0o644):
        path = self.path(name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'wb') as f:
            f.write(data)
        os.chmod(path, mode)
        return path

    def read(self, name):
        with open(self.path(name), 'rb') as f:
            return f.read()

    def make(self, *words, program='make', before=(), home=None, **options):
        """(status, what is printed).  What a word says last counts.  home:
        another QMAIL_HOME, or '' for none."""
        path = self.path('tools') + ':' + os.environ['PATH']
        home = self.home if home is None else home
        done = subprocess.run(
            list(before) + [find_program(program), '-s'] +
            ['PREFIX=' + self.prefix, 'PYTHON=' + self.python] +
            ['QMAIL_HOME=' + home] * bool(home) + list(words),
            cwd=self.source, timeout=60, env={'PATH': path},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
        return done.returncode, done.stdout.decode()

    def good(self, *words, **options):
        status, said = self.make(*words, **options)
        self.assertEqual(0, status, said)
        return said

    def tree(self, place=''):
        """{name: what it is} of all files and links."""
        found = {}
        for top, directories, names in os.walk(self.path(place)):
            for name in directories + names:
                path = os.path.join(top, name)
                if os.path.islink(path):
                    what = os.readlink(path)
                elif os.path.isfile(path):
                    with open(path, 'rb') as f:
                        what = f.read(), os.stat(path).st_mode & 0o7777
                else:
                    continue
                found[os.path.relpath(path, self.path(place))] = what
        return found

    def bin(self):
        return self.tree('home/bin')

    def old_ones(self, saved=''):
        return {name + saved: (data, 0o711)
                for name, data in self.old.items()}

    def test_install(self):
        """Where the files are, that all can read them, how they differ from
        the source; it runs, without any environment; and the way back."""
        before = self.tree()
        said = self.good('install', preexec_fn=lambda: os.umask(0o077))
        for top, _, names in os.walk(self.prefix):
            for path in [top] + [os.path.join(top, n) for n in names]:
                self.assertEqual(0o44, os.stat(path).st_mode & 0o44, path)
        self.assertEqual(
            [b'> LC_ALL=C %b -ISB -X under_sh -c \'' % self.python.encode(),
             b'> QMAIL_HOME = b"%b"' % self.home.encode()],
            [line for line in said.encode().split(b'\n')
             if line.startswith(b'>')])
        self.write('home/control/me', b'me.example')
        outcome = run_program(
            None, '[127.0.0.1]', 'a@b', 'c@d', env={
                'PATH': '/nonexistent', 'QMAILHOME': ''},
            command=[os.path.join(self.prefix, 'bin/qmail_remote.py')])
        self.assertEqual([qr.OWN_ADDRESS], outcome.reports)
        code = 'import importlib.util as u, sys; ' \
            'print(u.cache_from_source(sys.argv[1]))'
        cache = subprocess.check_output(
            [self.python, '-ISc', code, self.installed]).decode().strip()
        self.assertEqual(
            {'bin/qmail_remote.py', 'lib/qmail-remote/qmail_remote.py',
             os.path.relpath(cache, self.prefix),
             'share/man/man8/qmail_remote.py.8'}, set(self.tree('prefix')))
        # Bytecode that is not used would be read for nothing.
        if not os.getuid():
            self.write('other.py', self.read(self.installed).replace(
                b'invoked improperly', b'taken from bytes..'))
            os.utime(self.path('other.py'),
                     (1, os.stat(self.installed).st_mtime))
            subprocess.check_call(
                [self.python, '-ISc', 'import py_compile, sys; '
                 'py_compile.compile(*sys.argv[1:])',
                 self.path('other.py'), cache])
            self.assertIn(b'from bytes', subprocess.check_output(
                [self.installed]))
            os.unlink(self.path('other.py'))
        self.good('uninstall')
        self.assertEqual(before, self.tree())
        self.assertFalse(os.path.exists(self.library))

    def test_there_and_back(self):
        """The old programs are saved once, with their modes, and come back.
        uninstall finds the home in the installed file.  By two makes, with
        two sets of tools, staged and not."""
        tools = ('awk chmod cmp cp diff env grep id ln mkdir mv readlink rm '
                 'rmdir sed tr uname wc').split()
        for program, root, busybox in (('bmake', self.path('root'), False),
                                       ('make', '', True)):
            with self.subTest(program):
                for name in tools if busybox else ():
                    os.symlink(find_program('busybox'),
                               self.path('tools/' + name))
                if root:
                    self.write('root/opt/x', b'')
                    os.makedirs(self.path('root/var/q'))
                    os.rename(self.home, self.path('root/var/q/h'))
                    words = ['DESTDIR=' + root, 'PREFIX=/opt']
                    home = ['QMAIL_HOME=/var/q/h']
                else:
                    words, home = [], []
                place = 'root/var/q/h/bin' if root else 'home/bin'
                file = '/opt/lib/qmail-remote/qmail_remote.py' if root \
                    else self.installed
                for _ in range(2):
                    self.good('install-qmail', 'install-qmail-rspawn',
                              *words + home, program=program)
                    self.assertEqual(
                        dict(self.old_ones('.classic'),
                             **{name: file for name in self.old}),
                        self.tree(place))
                self.good('uninstall', 'QMAIL_HOME=/nonexistent', *words,
                          program=program)
                self.assertEqual(self.old_ones(), self.tree(place))
                if root:
                    self.assertEqual({'x'}, set(self.tree('root/opt')))
                    os.rename(self.path('root/var/q/h'), self.home)
                self.assertEqual({}, self.tree('prefix'))

    def test_no_link_is_left_behind(self):
        """Whatever leads to our file and has no old program: ours stays, and
        make says so."""
        self.good('install-qmail')
        os.unlink(self.path('home/bin/qmail-remote.classic'))
        os.symlink('qmail-remote', self.path('home/bin/other'))
        os.unlink(self.path('home/bin/qmail-rspawn'))
        os.symlink(os.path.join(self.prefix, 'bin/qmail_remote.py'),
                   self.path('home/bin/qmail-rspawn'))
        os.symlink('qmail-rspawn',
                   self.path('home/bin/qmail-rspawn.classic'))
        before = self.tree()
        for home in self.home, '/nonexistent':
            status, said = self.make('uninstall', 'QMAIL_HOME=' + home)
            self.assertNotEqual(0, status)
            for name in ('qmail-remote', 'qmail-rspawn', 'other',
                         'qmail-rspawn.classic'):
                self.assertIn('/bin/%s is a link to %s' % (
                    name, self.installed), said)
            self.assertEqual(before, self.tree())
        os.unlink(self.path('home/bin/other'))
        os.unlink(self.path('home/bin/qmail-rspawn.classic'))
        for name, data in self.old.items():
            self.write('home/bin/%s.classic' % name, data, 0o711)
        self.good('uninstall')
        self.assertEqual(self.old_ones(), self.bin())
        self.assertEqual({}, self.tree('prefix'))

    def test_one_directory_for_all(self):
        """LIBDIR may be BINDIR, and even the bin of the qmail home; what is
        there besides stays.  ln never has to replace a file."""
        self.write('tools/ln', b'#!/bin/sh\ncase $1 in -*f*) exit 9; esac\n'
                   b'exec busybox ln "$@"\n', 0o755)
        find_program('busybox')
        for place in 'prefix/bin', 'home/bin':
            with self.subTest(place):
                self.write('prefix/bin/other', b'')
                words = ['BINDIR=' + self.path(place),
                         'LIBDIR=%s/.' % self.path(place)]
                before = self.tree()
                self.good('install-qmail', *words)
                self.assertIsInstance(
                    self.tree(place)['qmail_remote.py'], tuple)
                self.assertIn(b'invoked improperly', subprocess.check_output(
                    [self.path('home/bin/qmail-remote')]))
                self.good('uninstall', *words)
                self.assertEqual(before, self.tree())

    def refused(self, why, *words, **options):
        before = self.tree()
        status, said = self.make(*words, **options)
        self.assertNotEqual(0, status, said)
        self.assertIn(why, said)
        self.assertIn('nothing is changed', said)
        self.assertEqual(before, self.tree())

    def test_home_of_an_upgrade(self):
        """Without QMAIL_HOME, it is the home that the installed file names,
        for install and for uninstall."""
        for program in 'make', 'bmake':
            with self.subTest(program):
                self.good('install-qmail', program=program)
                self.good('install', program=program, home='')
                self.assertIn(b'\nQMAIL_HOME = b"%b"\n' % self.home.encode(),
                              self.read(self.installed))
                self.good('install-qmail-rspawn', program=program, home='')
                self.assertEqual(self.installed, self.bin()['qmail-rspawn'])
                os.rename(self.path('home/control/me'), self.path('me'))
                self.refused('Unable to read control', 'install',
                             program=program, home='')
                os.rename(self.path('me'), self.path('home/control/me'))
                self.good('uninstall', program=program, home='')
                self.assertEqual(self.old_ones(), self.bin())

    def test_another_home(self):
        """A file serves one home.  make refuses to leave a link behind in
        the one before, which uninstall would not find."""
        for name in 'home2/bin', 'home2/control', 'home2/queue/mess':
            os.makedirs(self.path(name))
        self.write('home2/control/me', ME)
        self.write('home2/bin/qmail-remote', b'the second')
        os.symlink('home', self.path('alias'))
        alias, second = self.path('alias'), self.path('home2')
        link = self.path('home/bin/qmail-remote')
        self.good('install-qmail')
        for target in 'install', 'install-qmail', 'install-qmail-rspawn':
            self.refused('%s is a link to %s' % (link, self.installed),
                         target, home=second)
        self.good('install', home=alias + '/')
        self.good('install-qmail', 'PREFIX=' + self.path('prefix2'),
                  home=second)
        self.good('uninstall', 'PREFIX=' + self.path('prefix2'), home='')
        self.assertEqual({'qmail-remote'}, set(self.tree('home2/bin')))
        # Any name counts, and what leads to it by the link in BINDIR.
        self.good('uninstall', home='')
        self.good('install')
        os.symlink(os.path.join(self.prefix, 'bin/qmail_remote.py'),
                   self.path('home/bin/other'))
        self.refused('bin/other is a link', 'install', home=second)
        os.unlink(self.path('home/bin/other'))
        self.good('install-qmail', home=second)
        self.good('uninstall', home='')
        self.assertEqual({'qmail-remote'}, set(self.tree('home2/bin')))

    def test_another_home_staged(self):
        """Links in DESTDIR lead to where the files will be."""
        words = ['DESTDIR=' + self.path('root'), 'PREFIX=/opt']
        for name in 'one', 'two':
            os.makedirs(self.path('root/%s/bin' % name))
        self.good('install-qmail', *words, home='/one')
        self.refused('root/one/bin/qmail-remote is a link', 'install-qmail',
                     *words, home='/two')

    def test_uninstall_of_nothing(self):
        self.good('install-qmail')
        before = self.tree()
        status, said = self.make('uninstall', 'PREFIX=' + self.path('other'))
        self.assertNotEqual(0, status)
        self.assertIn('There is no %s/lib/qmail-remote/qmail_remote.py' %
                      self.path('other'), said)
        self.assertEqual(before, self.tree())

    def test_a_python_that_is_no_good(self):
        """What runs is not replaced by what does not."""
        self.write('prefix/lib/qmail-remote/qmail_remote.py', b'before')
        broken = self.path('tools/broken')
        for script, why in (
                ('case $1 in -ISc) echo %s ;; *) exit 1 ;; esac' % broken,
                'cannot run it'),
                ('echo python3', 'does not say where it is')):
            self.write('tools/broken', b'#!/bin/sh\n%b\n' % script.encode(),
                       0o755)
            self.refused(why, 'install-qmail', 'PYTHON=broken')
        self.refused('must begin with /', 'install', 'PREFIX=prefix')

    @unittest.skipIf(os.getuid(), 'takes root')
    def test_a_place_for_root_alone(self):
        """Of Python, of the file."""
        os.mkdir(self.path('private'), 0o700)
        os.symlink(self.python, self.path('private/python3'))
        self.refused('cannot run it', 'install',
                     'PYTHON=../private/python3')
        self.refused('cannot run it', 'install-qmail',
                     'PREFIX=' + self.path('private/prefix'))

    def test_control_files(self):
        """They are read as a delivery would before anything is changed."""
        control = os.path.join(self.home, 'control/')
        for target, name, data, why in (
                ('install-qmail-rspawn', 'smtproutes', b':x:66000',
                 'Unable to read control'),
                ('install-qmail', 'tlshosts/x.pem', '/nonexistent/x',
                 'cannot use control/tlshosts/x.pem'),
                ('install-qmail', 'tlshosts/a.example.pem', b'junk',
                 'cannot use control/tlshosts/a.example.pem'),
                ('install-qmail', 'notlshosts/b.example', b'\xef\xbb\xbf',
                 'cannot use control/notlshosts/b.example'),
                ('install-qmail', 'tlsclientciphers', b'\xef\xbb\xbfHIGH',
                 'cannot use control/tlsclientciphers'),
                ('install-qmail-rspawn', 'tlsclientciphers', b'NOSUCHCIPHER',
                 'cannot use control/tlsclientciphers'),
                ('install-qmail', 'clientcert.pem', pem('client').encode(),
                 'cannot use control/clientcert.pem'),
                ('install-qmail', 'clientcert.pem', 0o600,
                 'cannot use control/clientcert.pem'),
                ('install-qmail', 'authsenders', 0o600,
                 'Unable to read control')):
            with self.subTest(name):
                if isinstance(data, str):
                    os.mkdir(control + 'tlshosts')
                    os.symlink(data, control + name)
                elif isinstance(data, bytes):
                    self.write(control + name, data)
                elif os.getuid():
                    continue            # nobody here is another than we
                else:
                    self.write(control + name, b'', data)
                self.refused(why, target)
                os.unlink(control + name)
        if not os.getuid():
            for name in 'tlshosts/', 'notlshosts/':
                os.chmod(control + name, 0o700)
                self.refused('cannot use control/' + name, 'install-qmail')
                os.rmdir(control + name)
        os.unlink(control + 'me')
        self.refused('Unable to read control', 'install-qmail')
        self.write(control + 'me', ME)
        self.good('install-qmail')
        os.unlink(control + 'me')
        self.refused('Unable to read control', 'install')   # a switch now
        self.write(control + 'me', ME)
        os.rmdir(self.path('home/queue/mess'))
        self.refused('does not start', 'install-qmail-rspawn')
        shutil.rmtree(self.path('home/bin'))
        self.refused('There is no ', 'install-qmail')

    def test_good_tls_files(self):
        """They are no reason to refuse.  Nor is what a delivery never reads:
        another name in tlshosts, and, where Python has no ssl, what is in
        them."""
        for name, data in (
                ('tlshosts/a.example.pem', pem('ca').encode()),
                ('tlshosts/b \xe9.pem', pem('self+ca').encode()),
                ('tlshosts/README', b'\xef\xbb\xbf'),
                ('notlshosts/c.example', b'junk'),
                ('tlsclientciphers', b'HIGH:@SECLEVEL=0 \n'),
                ('clientcert.pem', pem('client', key=True).encode())):
            self.write('home/control/' + name, data)
        # qmailr may enter it, but not list it.
        os.chmod(self.path('home/control/tlshosts'), 0o711)
        for program in 'make', 'bmake':
            self.good('install-qmail', program=program)
        self.write('home/control/clientcert.pem', b'junk')
        self.write('tools/no_ssl', b'''#!/bin/sh
case $2 in *sys.executable*) echo %b; exit ;; esac
[ "$1" = -IBSc ] || exec %b "$@"
shift
exec %b -IBSc 'import sys; sys.modules["ssl"] = None; exec(sys.argv.pop(1))' \
    "$@"
''' % (self.path('tools/no_ssl').encode(), *[self.python.encode()] * 2), 0o755)
        self.refused('cannot use control/clientcert.pem', 'install')
        self.good('install', 'PYTHON=' + self.path('tools/no_ssl'))
        self.write('home/control/tlsclientciphers', b'\xef\xbb\xbf')
        self.refused('cannot use control/tlsclientciphers', 'install',
                     'PYTHON=' + self.path('tools/no_ssl'))

    def test_what_is_saved(self):
        """The saved program is never written over, and ours is never saved,
        whatever the sh in it looks like."""
        self.good('install-qmail')
        path = self.path('home/bin/qmail-remote')
        os.unlink(path)
        self.write(path, b'another', 0o711)
        self.refused('is another program', 'install-qmail')
        self.write(path, self.old['qmail-remote'], 0o711)
        self.good('install-qmail')
        os.unlink(path)
        self.write(path, b'#!/bin/sh\n' + self.read(
            self.installed)[200:], 0o755)
        self.good('install-qmail')
        self.assertEqual((self.old['qmail-remote'], 0o711),
                         self.bin()['qmail-remote.classic'])
        self.good('uninstall')
        self.assertEqual(self.old_ones(), self.bin())

    def test_as_qmailr(self):
        """If there is a qmailr, it is he who must be able to read the files,
        by his group."""
        if os.getuid() or subprocess.call(
                ['unshare', '-m', 'true'], stderr=subprocess.DEVNULL):
            self.skipTest('takes root and a mount namespace')
        self.write('passwd', b'root:x:0:0::/:/bin/sh\n'
                   b'qmailr:x:64990:64991::/:/nonexistent\n')
        before = ['unshare', '-m', 'sh', '-c', 'mount --bind "$0" /etc/passwd '
                  '&& exec "$@"', self.path('passwd')]
        path = self.write('home/control/authsenders', b'', 0o640)
        self.refused('Unable to read control', 'install-qmail',
                     before=before)
        os.chown(path, 0, 64991)
        said = self.good('install-qmail', before=before)
        self.assertNotIn('README', said)


class DebianPackage(unittest.TestCase):
    """make deb"""

    @classmethod
    def setUpClass(cls):
        find_program('dpkg-deb')
        cls.place = tempfile.mkdtemp(prefix='qmail-')
        for name in 'qmail_remote.py', 'Makefile', 'LICENSE', 'README':
            shutil.copy(os.path.join(HERE, name), cls.place)
        subprocess.check_call(
            ['make', '-s', 'deb', 'DEBPYTHON=' + sys.executable],
            cwd=cls.place, timeout=60, stdout=subprocess.DEVNULL,
            env={'PATH': os.environ['PATH']})
        cls.package, = glob.glob(os.path.join(cls.place, '*.deb'))

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.place)

    def dpkg(self, *words):
        """dpkg with a root of its own, where the scripts of the package work
        without chroot, by $DPKG_ROOT; (status, what it prints)."""
        done = subprocess.run(
            [find_program('dpkg'), '--root=' + self.root, '--force-depends',
             '--force-script-chrootless', '--force-not-root',
             '--log=/dev/null'] + list(words), timeout=60,
            env={'PATH': os.environ['PATH'] + ':/usr/sbin:/sbin'},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT)
        return done.returncode, done.stdout.decode()

    def test_in_and_out(self):
        """A package that qmail uses cannot be removed, unless it can bring
        the old program back."""
        self.root = os.path.join(self.place, 'root')
        os.makedirs(self.root + '/var/lib/dpkg/info')
        os.makedirs(self.root + '/var/lib/dpkg/updates')
        os.makedirs(self.root + '/var/qmail/bin')
        with open(self.root + '/var/lib/dpkg/status', 'w'):
            pass
        status, said = self.dpkg('-i', self.package)
        self.assertEqual(0, status, said)
        library = self.root + '/usr/lib/qmail-remote/'
        file = library + 'qmail_remote.py'
        cached = glob.glob(library + '__pycache__/*')
        self.assertEqual(1, len(cached))
        link = self.root + '/var/qmail/bin/qmail-remote'
        os.symlink('/usr/bin/qmail_remote.py', link)
        status, said = self.dpkg('-r', 'qmail-remote-py')
        self.assertNotEqual(0, status, said)
        self.assertIn('qmail-remote is a link to', said)
        self.assertTrue(os.path.exists(file))
        self.assertEqual(cached, glob.glob(library + '__pycache__/*'))
        with open(link + '.classic', 'w') as f:
            f.write('the old one')
        status, said = self.dpkg('-i', self.package)    # as an upgrade does
        self.assertEqual((0, True), (status, os.path.islink(link)), said)
        status, said = self.dpkg('-r', 'qmail-remote-py')
        self.assertEqual(0, status, said)
        self.assertEqual(['qmail-remote'], os.listdir(os.path.dirname(link)))
        with open(link) as f:
            self.assertEqual('the old one', f.read())
        self.assertFalse(os.path.exists(library))

    def test_what_is_in_it(self):
        subprocess.check_call(
            ['dpkg-deb', '-x', self.package, self.place + '/x'])
        root = self.place + '/x/usr/'
        self.assertEqual(
            ['bin/qmail_remote.py', 'lib/qmail-remote/qmail_remote.py',
             'share/doc/qmail-remote-py/README',
             'share/doc/qmail-remote-py/copyright',
             'share/man/man8/qmail_remote.py.8.gz'],
            sorted(os.path.relpath(os.path.join(top, name), root)
                   for top, _, names in os.walk(root) for name in names))
        program = root + 'lib/qmail-remote/qmail_remote.py'
        self.assertEqual(0o755, os.stat(program).st_mode & 0o7777)
        done = subprocess.run([program], stdout=subprocess.PIPE)
        self.assertEqual((0, qr.USAGE + b'\0'),
                         (done.returncode, done.stdout))


# ------------------------------------------------------------ ESMTP

class Pipelining(Dialogues):
    """MAIL, RCPT and DATA in one flight."""

    def test_replies_come_when_they_like(self):
        ok, end = says(*OK), 'turns 3\nalone\n' + DATA_TAKEN[len('D:\n'):]
        self.play(row(steps, PIPED + steps, 'r', ACCEPTED, wire=WIRE)
                  for steps in [
            FLIGHT + ok + 'D:\n' + end,
            MAIL + 'S: 250 ok\n' + RCPT + 'S: 250 ok\n' + DATA
            + 'S: 354 go\n' + DATA_TAKEN,
            FLIGHT + r's: 250 ok\r\n250 ok\r\n354 go\r\n' + '\n'
            + DATA_TAKEN,
            FLIGHT + 's: 250 ok\\r\\n25\nsleep 0.05\n'
            's: 0 ok\\r\\n3\nsleep 0.05\ns: 54 go\\r\nsleep 0.05\n'
            's: \\n\n' + DATA_TAKEN,
            FLIGHT + says('250-2.1.0', '250 ok', '250-a', '250-b', '250 ok',
                          '354-go', '354 on') + DATA_TAKEN,
            FLIGHT + ok + 'D:\n' + r's: 250 queued\r\n221 bye\r\n'])
        self.play(row('%s, %d' % (offer, count), hello(offer) + MAIL
                      + rcpts(count) + DATA
                      + says(*['250 ok'] * (count + 1) + ['354 go'])
                      + 'D:\n' + end, *['r'] * count + [ACCEPTED],
                      recipients=many(count), wire=WIRE)
                  for offer, count in (('pipelining', 1),
                                       ('PIPELINING 1 2', 100)))

    def test_nothing_is_pipelined_unasked(self):
        one_by_one = (MAIL + 'alone\nS: 250 ok\n' + RCPT + 'alone\nS: 250 ok'
                      '\n' + DATA + 'alone\nS: 354 go\nD:\nalone\n'
                      'S: 250 queued\nC: QUIT\nS: 221 bye\n')
        self.play(row(title, offer + one_by_one, 'r', ACCEPTED, wire=WIRE)
                  for title, offer in [
            ('no keywords', TO_EHLO + 'S: 250 fake\n'),
            ('other keywords', hello('XPIPELINING', 'PIPELININGX', 'HELP')),
            ('the name of the server', TO_EHLO + 'S: 250-PIPELINING\n'
             'S: 250 HELP\n'),
            ('HELO', TO_EHLO + 'S: 502-what?\nS: 502 PIPELINING\n'
             'C: HELO me.example\nS: 250-fake\nS: 250 PIPELINING\n')])

    def test_nobody_left(self):
        """Whatever the server makes of DATA then: it is decided."""
        no = PIPED + FLIGHT + says('250 ok', '550 no')
        self.play(row(steps, no + steps, 'h' + DISLIKES % '550 no',
                      'D' + GIVES_UP) for steps in [
            'S: 354 go\nD:\nC: QUIT\nS: 250 queued\nS: 221 bye',
            'S: 354 go\nclose', 'S: 451 none\nC: QUIT\nS: 221 bye',
            'S: 250 what?\nC: QUIT\nS: 221 bye', 'S: 421 bye\nQ:',
            'S: what?\nQ:', 'close', 'reset'])

    # A server that offers CHUNKING and acts like one that has it: whatever
    # comes in, it answers what an envelope and a chunk would get.
    MIDDLEBOX = hello('PIPELINING', 'CHUNKING') + 'R: 1\n'

    def test_no_chunking(self):
        """Each of these was a wrong report when the message left with the
        envelope: K, "Possible duplicate", or the next server not asked."""
        three = says('250 ok', '250 ok', '250 ok')
        self.play(row(steps, self.MIDDLEBOX + steps, *reports)
                  for steps, reports in [
            (three + 'sleep 0.3\nS: 554 no\nT:',
             ['r', 'Z' + DATA_NO % '250 ok']),
            ('S: 554 no\nsleep 0.3\n' + three + 'T:',
             ['D' + SENDER_NO % '554 no'])])
        self.play([row('a server that does not know BDAT', hello(
            'PIPELINING', 'CHUNKING', 'BINARYMIME') + FLIGHT + says(*OK)
            + DATA_TAKEN, 'r', ACCEPTED, wire=WIRE)])

    def test_more_after_the_verdict(self):
        """What comes behind the reply to the end of the data changes
        nothing, in its packet or half a second later."""
        self.play((row(said + more, to_end + said + more, 'r', report)
                   for to_end in (PIPED + FLIGHT + says(*OK) + 'D:\n', TO_END)
                   for said, report in (
                       (r's: 250 queued\r\n', ACCEPTED),
                       (r's: 554 no\r\n', 'D' + MESSAGE_NO % '554 no'),
                       (r's: 451 later\r\n', 'Z' + MESSAGE_NO % '451 later'))
                   for more in (
                       r'421 bye\r\n', r'221 bye\r\n', r'554 no\r\n',
                       r'what?\r\n', r'250 ok\r\n250 ok\r\n',
                       '\nsleep 0.5\nS: 421 bye', '\nsleep 0.5\nS: 250 ok')),
                  workers=12)

    def test_one_reply_too_many(self):
        """Then nothing can be told any more."""
        self.play([
            row('before the flight', PIPED.replace(
                'S: 250 HELP\n', r's: 250 HELP\r\n250 more\r\n' + '\n')
                + 'Q:', DIED),
            row('to MAIL', PIPED + FLIGHT + 's: ' + r'\r\n'.join(
                ['250 ok', '250 ok', '250 ok', '354 go', '']) + '\nQ:',
                'r', Like('Z', IP)),
            row('to DATA', PIPED + FLIGHT + 's: ' + r'\r\n'.join(
                ['250 ok', '250 ok', '354 go', '250 queued', '']) + '\nT:',
                'r', DIED)])

    def test_narrow_windows(self):
        """A server that answers at once, and reads on only when its answer
        is gone; one that holds its replies back."""
        long = 'x' * 400
        names = many(1500)
        talk = MAIL + 'S: 250 ok\n' + ''.join(
            'C: RCPT TO:<%s>\nS: %s\n' % (
                x, ('250 ' if i % 3 else '550 ') + long)
            for i, x in enumerate(names))
        end = 'S: 354 go\n' + DATA_TAKEN
        self.play([
            row('at once', 'narrow\n' + PIPED + talk + DATA + end, *[
                'r' if i % 3 else 'h' + DISLIKES % ('550 ' + long)
                for i in range(1500)] + [ACCEPTED], recipients=names,
                wire=WIRE, narrow=True),
            row('held back', 'narrow\n' + PIPED + MAIL + rcpts(1500) + DATA
                + says(*['250 ok'] * 1501) + end, *['r'] * 1500 + [ACCEPTED],
                recipients=names, wire=WIRE, narrow=True)])

    def test_refused_while_we_still_send(self):
        """The server has answered MAIL and left; RCPTs are still to go."""
        no = 'narrow\n' + PIPED + MAIL + 'S: 550 no\n'
        second = Like('K127.0.0.3 accepted message.\n')
        self.play([
            row('closes', no + 'close', 'D' + SENDER_NO % '550 no',
                recipients=many(5000)),
            row('resets', no + 'sleep 0.2\nreset', 'D' + SENDER_NO
                % '550 no', recipients=many(5000)),
            row('closes, then the next one', {
                '127.0.0.2': no + 'close', '127.0.0.3': ACCEPT}, 'r', second),
            row('refuses a recipient and closes', 'narrow\n' + PIPED + MAIL
                + 'S: 250 ok\n' + RCPT + 'S: 550 no\nclose',
                'h' + DISLIKES % '550 no', DIED, recipients=many(5000)),
            row('says nothing and closes', 'narrow\n' + PIPED + MAIL
                + 'close', DIED, recipients=many(5000))])


class Parameters(Dialogues):
    """What MAIL says of the message: SIZE, BODY and SMTPUTF8."""

    def mail(self, offered, message=b'', sender=b's@x', recipient=b'r@x'):
        """MAIL for such a message, after its sender."""
        with tempfile.TemporaryFile() as body:
            body.write(message)
            body.seek(0)
            line = qr.Transaction(
                None, qr.SessionFacts(b'', qr.parse_ehlo(offered), False,
                                      b'', b'', b''),
                qr.Envelope(sender, [None, recipient]),
                qr.Message(body.fileno())).mail_command()
        return line.partition(b'>')[2]

    def test_mail(self):
        """Survey has the sizes."""
        u8, eight = 'm\u00fcller@x'.encode(), b'\xc3\xa4\n\xe4\n'
        for lines, want, options in (
                (b'', b'', dict(message=eight)),
                (b'SIZE', b' SIZE=7', dict(message=b'a\n.b\n')),
                (b'size 5', b' SIZE=7', dict(message=b'a\n.b\n')),
                (b'SIZE 0', b' SIZE=0', {}),
                (b'XSIZE 1\n250-SIZES', b'', dict(message=b'a\n')),
                (b'8BITMIME', b' BODY=8BITMIME', dict(message=eight)),
                (b'8BITMIME', b'', dict(message=b'\0\1\x7f\n')),
                (b'8BITMIME\n250-SIZE', b' SIZE=7 BODY=8BITMIME',
                 dict(message=eight)),
                (b'SIZE', b' SIZE=7', dict(message=eight)),
                (b'SMTPUTF8', b'', {}),
                (b'SMTPUTF8', b' SMTPUTF8', dict(sender=u8)),
                (b'SMTPUTF8', b' SMTPUTF8', dict(recipient=u8)),
                (b'SMTPUTF8\n250-SIZE', b' SIZE=0 SMTPUTF8',
                 dict(sender=u8))):
            self.assertEqual(want, self.mail(
                b'250-x\n250-%s\n250 y\n' % lines, **options), lines)

    def test_in_a_session(self):
        sender, other = 'm\u00fcller x@here.example', 'one@th\u00e9re.example'
        long = (b'x' * 99 + b'\n') * 1000
        from_ = 'C: MAIL FROM:<%s>'
        rest = 'S: 250 ok\n' + RCPT + 'S: 250 ok\n' + DATA + 'S: 354 go\n' \
            + DATA_TAKEN
        self.play([
            row('a small pipe', hello('SIZE', '8BITMIME') + MAIL[:-1]
                + ' SIZE=3 BODY=8BITMIME\n' + rest, 'r', ACCEPTED,
                stdin=piped(b'\xe4\n'), wire=b'\xe4\r\n'),
            row('a long pipe: not known', hello('SIZE', '8BITMIME')
                + MAIL[:-1] + ' BODY=8BITMIME\n' + rest, 'r', ACCEPTED,
                stdin=piped(long), wire=long.replace(b'\n', b'\r\n')),
            row('552 to MAIL', hello('SIZE 5') + MAIL[:-1]
                + ' SIZE=33\nS: 552 too big\nQ:',
                'D' + SENDER_NO % '552 too big'),
            row('SMTPUTF8, pipelined', hello('PIPELINING', 'SMTPUTF8')
                + from_ % '"m\u00fcller x"@here.example' + ' SMTPUTF8\n'
                'C: RCPT TO:<%s>\n' % other + DATA + says(*OK) + DATA_TAKEN,
                'r', ACCEPTED, sender=sender.encode(),
                recipients=[other.encode()])])

    def test_smtputf8_is_not_offered(self):
        """A refusal, if the sender or all recipients need it: the next
        server.  If only some need it, the others get the mail."""
        sender, other = 'm\u00fcller@here.example', 'one@th\u00e9re.example'
        lacks = PIPED + 'C: QUIT\nS: 221 bye'
        has = (hello('SMTPUTF8') + 'C: MAIL FROM:<%s> SMTPUTF8\nS: 250 ok\n'
               'C: RCPT TO:<%s>\nS: 250 ok\nC: DATA\nS: 354 go\nD:\n'
               'S: 250 queued\nQ:')
        eight = '%s127.0.0.%d does not take non-ASCII addresses'
        needs = {'sender': sender.encode()}, {'recipients': [
            other.encode(), b'a@b\rc', 'two@th\u00e9re.example'.encode()]}
        login = {'smtproutes': b':127.0.0.1:PORT|user|password'}
        self.play(
            row(title, script, Like(start, *words), **dict(options, **need))
            for need in needs for title, script, start, words, options in [
                ('one server', lacks, eight % ('D', 1), ['(#5.6.7)\n'], {}),
                ('two servers', {'127.0.0.2': lacks, '127.0.0.3': lacks},
                 eight % ('D', 2), ['127.0.0.2: no SMTPUTF8\n',
                                    '127.0.0.3: no SMTPUTF8\n'], {}),
                ('the other one dies', {
                    '127.0.0.2': 'close', '127.0.0.3': lacks},
                 eight % ('Z', 3), [], {}),
                ('no AUTH', lacks, eight % ('Z', 1), [NO_AUTH],
                 {'control': login}),
                ('no TLS', [TLS_REFUSED, OFFER + 'C: QUIT'],
                 eight % ('Z', 1), ['TLS failed: STARTTLS refused'], {})])
        self.play(row(title, dict(zip(('127.0.0.2', '127.0.0.3'), servers)),
                      *reports, **options)
                  for title, servers, reports, options in [
            ('the next server', (lacks, has % (sender, RECIPIENTS[0])),
             ['r', Like('K127.0.0.3 accepted message.\n',
                        '127.0.0.2: no SMTPUTF8\n')], needs[0]),
            ('some recipients', (PIPED + FLIGHT + says(*OK) + DATA_TAKEN, []),
             [Like(eight % ('s', 2), '(#4.6.7)\n'), 'r',
              ACCEPTED.replace(IP, '127.0.0.2')],
             {'recipients': [other.encode(), RECIPIENTS[0]]}),
            ('some, and the others are refused', (
                TO_RCPT + 'S: 550 no\nQ:', []), [
                'h' + DISLIKES.replace(IP, '127.0.0.2') % '550 no',
                Like(eight % ('s', 2)), 'ZGiving up on 127.0.0.2.\n'],
             {'recipients': [RECIPIENTS[0], other.encode()]})])


UNENCRYPTED = qr.TlsPolicy(qr.TlsPolicy.CLEAR, None)
PASSWORD_ROUTE = value_of(qr.Route, relay=b'127.0.0.2',
                          credentials=(b'u', b'p'))


def server_at(address, port, records=()):
    """A Server with these TLSA records; None: they are unknown."""
    status = 'unknown' if records is None else \
        'records' if records else 'none'
    return qr.Server(address, port, b'relay.example', qr.Tlsa(
        status, list(records or ()), None), [])


class ScriptedSocket(Scripted):
    """A Scripted that a whole session can be played with."""

    def close(self):
        pass


class Survey(Tables):
    """What Message knows before it is sent."""

    MOST = qr.PEEK_MAX

    def opened(self, kind, data):
        """A checked Message on a file, or on a pipe."""
        if kind == 'pipe':
            fd = piped(data)()
        else:
            with tempfile.TemporaryFile() as f:
                f.write(b'skipped' + data)
                f.flush()
                fd = os.dup(f.fileno())
            os.lseek(fd, 7, os.SEEK_SET)
        self.addCleanup(os.close, fd)
        message = qr.Message(fd, seconds=7)
        message.check()
        return message

    def test_survey(self):
        # A message; its size on the wire, whether it holds 8-bit bytes
        lines = b'x' * 9 + b'\n'
        for data, size, eight_bit in (
                (b'', 0, False), (b'\n', 2, False), (b'a\n', 3, False),
                (b'.\n', 3, False), (b'a\n\n', 5, False),
                (b'\x7f\0\n', 4, False), (b'\x80\n', 3, True),
                (b'\xff\n', 3, True), (b'a\n\xc3\xa4\n', 7, True),
                (b'a\r\n', 4, False),           # RFC 1870 6: an estimate
                (lines * 3000, 33000, False),
                (lines * 2999 + b'\xe4' * 9 + b'\n', 33000, True)):
            for kind in 'file', 'pipe':
                message = self.opened(kind, data)
                self.check((size, eight_bit), message.scan)
                self.check((size, eight_bit), message.scan)   # once more
                self.check(data, lambda: b''.join(message.blocks()))

    def test_survey_of_large_ones(self):
        """The lines of the first 4 MiB stand for all; 8-bit bytes count
        wherever they are.  Of a pipe nothing is known."""
        lines = (b'x' * 15 + b'\n') * 327679
        for data, eight_bit in ((lines + lines[:16], False),
                                (lines + b'\xe4' * 15 + b'\n', True)):
            message = self.opened('file', data)
            self.check((5570560, eight_bit), message.scan)
            self.check(data, lambda: b''.join(message.blocks()))
            self.check((None, True), self.opened('pipe', data).scan)

    def test_small(self):
        """What was looked at still goes out, and once."""
        most = b'x' * (self.MOST - 1) + b'\n'
        for data, want in ((b'', b''), (b'a\n', b'a\n'), (most, most),
                           (b'x' + most, None), (most * 20, None)):
            for kind in 'file', 'pipe':
                message = self.opened(kind, data)
                self.check(want, message.read_if_small)
                self.check(want, message.read_if_small)
                self.check(data, lambda: b''.join(message.blocks()))
        for data in b'a', b'a\nb', b'a\r', most[:-1]:
            self.check(qr.PARTIAL_LINE,
                       self.opened('pipe', data).read_if_small)
            self.check(qr.PARTIAL_LINE, self.opened('pipe', data).scan)
        message = self.opened('pipe', b'x' * self.MOST + b'y')
        self.check(None, message.read_if_small)
        self.check(qr.PARTIAL_LINE, lambda: b''.join(message.blocks()))

    def test_a_pipe_in_drips(self):
        """A small message need not come in one piece."""
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)

        def feed():
            for byte in b'ab\nc\n':
                os.write(writer, bytes([byte]))
                time.sleep(0.005)
            os.close(writer)
        threading.Thread(target=feed).start()
        self.check(b'ab\nc\n', qr.Message(reader, seconds=7).read_if_small)

    def test_a_file_that_changes(self):
        """It shrinks or grows after check()."""
        for more, size in ((b'', 3), (b'b' * 40000 + b'\n', 40004)):
            with tempfile.TemporaryFile() as f:
                f.write(b'a\nb\n')
                f.flush()
                f.seek(0)
                message = qr.Message(f.fileno(), seconds=7)
                message.check()
                os.ftruncate(f.fileno(), 3)
                os.pwrite(f.fileno(), more, 3)
                self.check(None if more else qr.PARTIAL_LINE,
                           message.read_if_small)
                if more:
                    self.check(size, lambda: len(b''.join(message.blocks())))

    def test_is_ascii(self):
        class Old(bytes):
            """As before Python 3.7."""
            def __getattribute__(self, name):
                if name == 'isascii':
                    raise AttributeError(name)
                return super().__getattribute__(name)
        for data, want in ((b'', True), (b'a', True), (b'\0\x7f\r\n', True),
                           (b'\x80', False), (b'a' * 9999 + b'\xff', False),
                           (bytes(range(128)), True)):
            self.check(want, qr.is_ascii, data)
            self.check(want, qr.is_ascii, Old(data))

    def connection(self, received, sent):
        """A Connection on which these things happen in turn."""
        return qr.Connection(ScriptedSocket(received, sent),
                             VirtualClock().at_once, VirtualClock())

    def dialogue(self, received, sent, credentials=None):
        return qr.Dialogue(self.connection(received, sent), 5,
                           qr.Redactor(credentials), qr.NO_TRACE)

    def session(self, received, sent, policy=UNENCRYPTED, server=None,
                offered=(), route=PASSWORD_ROUTE):
        """A Session that has got as far as AUTH."""
        session = qr.Session(
            self.dialogue(received, sent, route.credentials),
            server or server_at(b'127.0.0.2', 25), route,
            qr.TlsSetup(policy, None, None, b''), b'me.example')
        session.offered = {b'AUTH': list(offered)}
        return session

    def converse(self, received, sent, message):
        """(the Result of a session, what the server got)."""
        connection = self.connection(received, sent)
        return converse_on(
            connection, server_at(b'127.0.0.2', 25), UNENCRYPTED,
            qr.Envelope(b's@x', [b'r@x']), message), connection.sock.data

    def test_when_the_dot_is_out(self):
        """From its last byte on the message may be delivered, and not
        before, wherever the pieces end."""
        wait, piece = BlockingIOError(), qr.SEND_PIECE
        gone = OSError(errno.ECONNRESET, 'gone')
        broken = OSError(errno.EPIPE, 'gone')
        facts = qr.SessionFacts(b'127.0.0.2', {}, False, b'', b'', b'')
        for size in [2] + list(range(piece - 4, piece + 3)):
            for missing in 0, 1, 2, 3:
                left = size + 3 - missing
                parts = [min(left, piece), max(0, left - piece), broken]
                dialogue = self.dialogue(
                    [wait] * 3 + [gone], [part for part in parts if part])
                dialogue.advance(sent=qr.DATA, replied=qr.DATA)
                transaction = qr.Transaction(
                    dialogue, facts, qr.Envelope(b's@x', [b'r@x']),
                    self.opened('file', b'a' * (size - 2) + b'\n'))
                with self.subTest((size, missing)):
                    self.assertRaises(qr.ConnectionLost,
                                      transaction.transfer)
                    self.assertEqual(not missing, dialogue.in_doubt)

    def test_a_file_that_cannot_be_read_any_more(self):
        message = self.opened('file', b'x\n' * self.MOST)
        null = os.open('/dev/null', os.O_WRONLY)
        os.dup2(null, message.fd)
        os.close(null)
        self.check(qr.NO_MESSAGE, message.scan)

    TALK = [b'220 fake\r\n', BlockingIOError(), b'250 fake\r\n',
            BlockingIOError(), b'250 ok\r\n', BlockingIOError(),
            b'250 ok\r\n', BlockingIOError(), b'354 go\r\n',
            BlockingIOError()]

    def test_trouble_of_our_own(self):
        """Whatever happens once the dot is out, the message may have been
        taken; before, it has not."""
        late = qr.DIED_LATE % b'127.0.0.2'
        for error, early in (
                (qr.LocalFault(qr.KILLED), qr.KILLED),
                (MemoryError(), MemoryError), (ValueError(), ValueError)):
            for words in (6, 8, 10):
                connection = self.connection(self.TALK[:words], [])

                waits = iter(range(words // 2))     # one for each reply

                def wait(*_, waits=waits):
                    if next(waits, None) is None:
                        raise error
                connection.wait = wait
                with self.subTest(repr((error, words))):
                    try:
                        result = converse_on(
                            connection, server_at(b'127.0.0.2', 25),
                            UNENCRYPTED,
                            qr.Envelope(b's@x', [b'r@x']),
                            self.opened('file', b'a\n'))
                        got = result.report
                        self.assertEqual([b'r'] * (words > 6),
                                         result.recipients)
                    except (MemoryError, ValueError) as other:
                        got = type(other)
                    self.assertEqual(late if words == 10 else early, got)

    def test_no_line_within_a_command(self):
        """Whatever got through all other checks: nothing is sent."""
        for command in b'RCPT TO:<a\r\nb>', b'a\rb', b'a\nb', b'a\0b':
            dialogue = self.dialogue([], [])
            self.check(qr.NO_RESOURCES, dialogue.send_pipelined,
                       [(qr.MAIL, b'NOOP'), (qr.RCPT, command)])
            self.assertEqual(b'', dialogue.connection.sock.data)

    def test_no_quit_after_half_a_command(self):
        """The server would take it for a part of that."""
        wait, hello = BlockingIOError(), b'EHLO me.example\r\n'
        result, sent = self.converse(
            [b'220 fake\r\n', wait, b'250-fake\r\n250 PIPELINING\r\n', wait,
             b'550 no\r\n'],
            [len(hello), 5, OSError(errno.EPIPE, 'gone')] + [99] * 9,
            self.opened('file', b'a\n'))
        self.assertEqual(
            (b'DConnected to 127.0.0.2 but sender was rejected.\n'
             b'Remote host said: 550 no\n', True),
            (result.report, result.try_next))
        self.assertEqual(hello + b'MAIL ', sent)

    def test_a_334_too_many(self):
        """The dialogue is called off, so that QUIT is no answer in it."""
        wait, plain = BlockingIOError(), b'AHUAcA=='
        session = self.session([wait, b'334 \r\n', wait, b'334 \r\n'], [],
                               offered=[b'PLAIN'])
        self.check(qr.AUTH_REJECTED % (b'127.0.0.2', b'plain') +
                   b'Remote host said: 334 \n',
                   lambda: session.authenticate().report)
        self.assertEqual(b'AUTH PLAIN %s\r\n%s\r\n*\r\nQUIT\r\n' % (
            plain, plain), session.dialogue.connection.sock.data)

    def test_no_password_without_verified_tls(self):
        """The last guard, whatever choose_tls() may have made of it."""
        for encrypted, level in ((False, qr.TlsPolicy.SYSTEM),
                                 (True, qr.TlsPolicy.UNCHECKED),
                                 (True, qr.TlsPolicy.IF_OFFERED),
                                 (False, qr.TlsPolicy.CLEAR)):
            session = self.session(
                [], [], qr.TlsPolicy(level, None),
                server_at(b'192.0.2.1', 2525), [b'PLAIN'])
            session.encrypted = encrypted
            self.check(qr.NO_RESOURCES, session.authenticate)
            self.assertEqual(b'', session.dialogue.connection.sock.data)


class LastReply(ScriptedSocket):
    """A ScriptedSocket whose last reply ends a message.  Once the program
    has read that, the call that it makes as number `left` fails with
    error(), be it Python's or C's, until deliver() returns."""

    def __init__(self, received, left, error):
        ScriptedSocket.__init__(self, received, [])
        self.last, self.left, self.error = received[-1], left, error
        self.read, self.failed = False, None

    def recv(self, size):
        data = super().recv(size)
        if data is self.last:
            sys.setprofile(self.profile)
        return data

    def profile(self, frame, event, arg):
        if event == 'return' and \
                frame.f_code is qr.Connection.reply.__code__:
            self.read = True
        elif event == 'return' and frame.f_code is qr.deliver.__code__:
            sys.setprofile(None)
        elif event == 'call' and frame.f_code.co_flags & 0x20:
            pass        # a generator: CPython 3.11 dies of an error there
        elif self.read and event in ('call', 'c_call'):
            self.left -= 1
            if not self.left:
                self.failed = frame.f_code.co_name, arg
                raise self.error()


class AfterTheVerdict(Tables):
    """Nothing changes what a 2xx to the end of the data has made of a
    message, or a 4xx, and a 5xx leads to nothing but D or Z: no call that
    fails after it, wherever in the program."""

    ERRORS = [MemoryError, lambda: OSError(errno.EIO, 'no'), ValueError,
              lambda: qr.LocalFault(qr.KILLED), qr.TimedOut,
              lambda: qr.ConnectionLost(b'lost'),
              lambda: qr.TlsFailed(b'no TLS'), KeyboardInterrupt]

    class Resolver:
        def trusted(self):
            return False

        def ask(self, questions, enough=None):
            return [qr.Lookup(qr.Lookup.OK, {
                qr.MX: [(1, b'\1a\0'), (2, b'\1b\0'), (3, b'\1c\0')],
                qr.A: [b'192.0.2.%d' % name[1]], qr.AAAA: []}[qtype], False,
                name) for name, qtype in questions]

    def deliver(self, verdict, left, error):
        """The Report of a delivery while somebody looks on, and the call
        that failed.  The first exchanger closes the line; the third must not
        be asked."""
        talk = [b'220 fake\r\n', b'250 fake\r\n', b'250 ok\r\n',
                b'250 ok\r\n', b'354 go\r\n', BlockingIOError(), verdict]
        sock = LastReply([step for words in talk
                          for step in (BlockingIOError(), words)][1:], left,
                         error)
        sockets, clock = [ScriptedSocket([b''], []), sock], VirtualClock()
        null = os.open(os.devnull, os.O_WRONLY)
        context = context_of(
            resolver=self.Resolver(), is_own=lambda address: False,
            tcpto=qr.TcpTo(b'/nonexistent', time.time, 1, qr.wait),
            connect=lambda *_: sockets.pop(0),
            connection=lambda sock: qr.Connection(sock, clock.at_once,
                                                  clock),
            message=self.message, trace=qr.Trace(null, clock.at_once,
                                                   clock),
            tls_control=lambda name: value_of(qr.TlsControl))
        os.lseek(self.message.fd, 0, os.SEEK_SET)
        try:
            # A generator that cannot be closed says so on stderr.
            with contextlib.redirect_stderr(io.StringIO()):
                return qr.deliver(b'there.example', b's@x', [b'r@x'],
                                  control_files(), context), sock.failed
        finally:
            sys.setprofile(None)
            os.close(null)

    def test_no_call_changes_it(self):
        self.addCleanup(sys.setprofile, sys.getprofile())
        body = tempfile.TemporaryFile()
        self.addCleanup(body.close)
        body.write(b'a\n')
        body.flush()
        self.message = qr.Message(body.fileno())
        for verdict, letters in (
                (b'250-a\r\n250 b\r\n421 bye\r\n', b'K'),
                (b'451 later\r\n', b'Z'), (b'554 no\r\n', b'DZ')):
            for error in self.ERRORS:
                left, failed = 0, True
                while failed:
                    left += 1
                    got, failed = self.deliver(verdict, left, error)
                    if got.report[0] not in letters or b'duplicate' in \
                            got.report or got.recipients != [b'r']:
                        self.fail('%s after %r and %r' % (
                            got.report, verdict, failed))
                self.assertIn(b'192.0.2.97: connection closed\n',
                              got.report)
                self.assertEqual(letters[:1], got.report[:1])
                self.assertGreater(left, 20)


# ------------------------------------------------------------ TLS: tables

KNOWN_KEYS = {      # openssl x509 -pubkey | openssl pkey -pubin -outform DER
    'ca': 'c9794edab9dd5a0f2a9753b54b9eca229b476d2abe6a277767247c1ef791e257',
    'inter':
        '1195043660f89b0e728d60c483d2728170d88163747ee808825a925968400f13',
    'relay':
        '1d2456ca588a460093fae64bf2e17a13300a54c2e0f49d930752d0e9f4e8193e',
    'self':
        '9bd8c3cdac33f9eacb7ecc43f0c01cc61bfc1808cdcb6b2f92b5572c03993aee'}
KNOWN_KEYS.update(dict.fromkeys(('expired', 'below', 'other', 'client'),
                                KNOWN_KEYS['relay']))

CHAINS = qr.can_show_chain()        # this Python shows what a server shows

PEM_FILE = pem('ca').encode()
FILE, PINNED, DANE, ANCHORS = [
    getattr(qr.TlsPolicy, name)
    for name in ('FILE', 'PINNED', 'DANE', 'ANCHORS')]
IN_THE_CLEAR, IF_OFFERED, UNCHECKED, BY_SYSTEM, CONFLICT = [
    qr.TlsPolicy(getattr(qr.TlsPolicy, name), None) for name in (
        'CLEAR', 'IF_OFFERED', 'UNCHECKED', 'SYSTEM', 'CONFLICT')]
BY_FILE = qr.TlsPolicy(FILE, PEM_FILE)


class TlsTables(Tables):
    """What TLS policy and the checks make of what they are given."""

    def test_host_text(self):
        """What may be part of a path, and of a certificate's name."""
        for text in ('relay.example', 'a-b_c.0.example',
                     'xn--mller-kva.example', 'com'):
            self.check(text.encode(), qr.host_text, dns_name(text))
        for name in (b'', b'\0', b'\x01/\0', b'\x03a/b\0', b'\2..\0',
                     b'\x01.\x01a\0', b'\x05a.pem\0',
                     b'\x06../../\7example\0', b'\x03a\0b\0', b'\x03a\nb\0',
                     b'\x03a b\0', b'\2\xc3\xbc\0', b'\x03a*b\0'):
            self.check(None, qr.host_text, name)

    def test_must_verify(self):
        """A password needs verified TLS everywhere but on ports 25 and 26,
        and to this host itself."""
        for addresses, ports, want in (
                ('192.0.2.1 2001:db8::1', (25, 26), False),
                ('192.0.2.1 2001:db8::1 128.0.0.1 12.7.0.1 ::127 0.0.0.0 :: '
                 '1::1', (24, 27, 465, 587, 2525, 65535), True),
                ('127.0.0.1 127.255.0.9 ::1', (465, 587, 2525), False)):
            for address in addresses.split():
                for port in ports:
                    self.check(want, qr.must_verify,
                               server_at(address.encode(), port))

    def test_choose_tls(self):
        """Ports, whether there is a password, TLSA records, tlshosts,
        notlshosts (*: with and without); the policy."""
        right, useless = (3, 1, 1, bytes(32)), (0, 0, 1, bytes(32))
        tlsa_cells = {'none': [], 'right': [right], 'useless': [useless],
                      'both': [useless, right], 'unknown': None}
        wanted = {'CLEAR': IN_THE_CLEAR, 'IF_OFFERED': IF_OFFERED,
                  'UNCHECKED': UNCHECKED, 'SYSTEM': BY_SYSTEM,
                  'CONFLICT': CONFLICT, 'FILE': BY_FILE}
        for ports, password, tlsa_cell, pem_cell, never, level in rows('''
                25,26               *   none            -   -   IF_OFFERED
                587,465,2525        -   none            -   -   IF_OFFERED
                587,465,2525,27     +   none            -   -   SYSTEM
                25,587,465          *   none,unknown    +   *   FILE
                25                  *   right,useless   +   *   FILE
                25                  *   none,unknown    -   +   CLEAR
                25                  *   right           -   +   CLEAR
                587,465,2525        +   none,right      -   +   CONFLICT
                25                  -   right,both      -   -   DANE
                587                 +   right           -   -   DANE
                25                  -   useless         -   -   UNCHECKED
                587                 +   useless         -   -   SYSTEM'''):
            for port, secret, name, file, no in itertools.product(
                    ports.split(','), password.replace('*', '+-'),
                    tlsa_cell.split(','), pem_cell, never.replace('*', '+-')):
                records = tlsa_cells[name]
                self.check(
                    wanted.get(level) or qr.TlsPolicy(DANE, [right]),
                    qr.choose_tls, server_at(b'192.0.2.1', int(port), records),
                    secret == '+', qr.TlsControl(
                        PEM_FILE if file == '+' else None, no == '+', None,
                        b''))
        nothing = qr.TlsControl(None, False, None, b'')
        for port in (465, 2525):        # it does not leave this host
            self.check(IF_OFFERED, qr.choose_tls,
                       server_at(b'127.0.0.1', port), True, nothing)
        self.check(qr.TlsPolicy(FILE, b''), qr.choose_tls,     # not absent
                   server_at(b'192.0.2.1', 25), False,
                   qr.TlsControl(b'', False, None, b''))

    def test_levels(self):
        """What each level of a TlsPolicy means: TLS is used, required, the
        certificate verified, a TLS session may be resumed."""
        for level, meaning in [
                ('CLEAR', '---r'), ('IF_OFFERED', 'w--r'),
                ('UNCHECKED', 'wm-r'), ('SYSTEM', 'wmvr'), ('FILE', 'wmvr'),
                ('PINNED', 'wmv-'), ('DANE', 'wmv-'), ('ANCHORS', 'wmv-'),
                ('CONFLICT', '-m-r')]:
            policy = qr.TlsPolicy(getattr(qr.TlsPolicy, level), None)
            with self.subTest(level):
                self.assertEqual(meaning, ''.join(
                    letter if holds else '-' for letter, holds in zip('wmvr', (
                        policy.wanted, policy.required, policy.verified,
                        policy.may_resume))))

    def test_last_policy(self):
        failed, bad = qr.TlsFailed(b'no'), qr.TlsFailed(b'no', (), True)
        found = qr.TlsFailed(b'no', [b'certificate'])
        by_anchors = qr.TlsPolicy(ANCHORS, [b'certificate'])
        by_dane = qr.TlsPolicy(DANE, [])
        by_pin = qr.TlsPolicy(PINNED, PEM_FILE)
        for policy, error, port, password, last in [
                (IF_OFFERED, failed, 25, False, IN_THE_CLEAR),
                (IF_OFFERED, failed, 587, False, IN_THE_CLEAR),
                (IF_OFFERED, failed, 465, False, None),
                (IF_OFFERED, failed, 25, True, None),
                (UNCHECKED, failed, 25, False, None),
                (BY_FILE, failed, 25, False, None),
                (BY_FILE, bad, 25, False, by_pin),
                (BY_SYSTEM, failed, 587, True, None),
                (BY_SYSTEM, bad, 587, True, None),
                (by_dane, failed, 25, False, None),
                (by_dane, found, 25, False, by_anchors)]:
            self.check(last, qr.last_policy, policy, error, port, password)

    def test_hint(self):
        """What the report tells an administrator to do: to trust another
        certificate, only if that is what it takes."""
        bad, failed = qr.TlsFailed(b'no', (), True), qr.TlsFailed(b'no')
        password = (b'No password is sent to this port without TLS and a '
                    b'certificate that can be\nverified.\n')
        clear = b'No password is sent in the clear after TLS has failed.\n'
        trust = (b"To trust this relay, put its certificate, or its CA's, "
                 b'into\ncontrol/tlshosts/relay.example.pem.\n')
        only = (b'Only the certificates in control/tlshosts/relay.example.pem'
                b'\nare trusted for this server.\n')
        for policy, error, secret, hint in [
                (BY_SYSTEM, bad, True, password + trust),
                (BY_SYSTEM, failed, True, password),
                (BY_FILE, bad, True, only), (BY_FILE, bad, False, only),
                (BY_FILE, failed, True, b''), (UNCHECKED, failed, True, b''),
                (IF_OFFERED, failed, True, clear),
                (IF_OFFERED, failed, False, b'')]:
            self.check(hint, qr.tls_hint, policy, error, secret,
                       b'relay.example')

    def test_der_item(self):
        for data, item in [
                (b'\x30\0', (0x30, 2, 2)), (b'\x04\x02ab', (4, 2, 4)),
                (b'\x04\x81\x02ab', (4, 3, 5)),
                (b'\x04\x82\0\x02abc', (4, 4, 6)),
                (b'\x04\x7f' + bytes(127), (4, 2, 129)),
                (b'', ValueError), (b'\x30', ValueError),
                (b'\x30\x01', ValueError), (b'\x30\x81', ValueError),
                (b'\x30\x82\x01', ValueError),
                (b'\x30\x82\xff\xff', ValueError),
                (b'\x30\xff' + b'\xff' * 200, ValueError)]:
            self.check(item if item is ValueError else qr.DerItem(*item),
                       qr.der_item, data, 0)

    def test_public_key(self):
        """Whatever comes in: the right bytes or ValueError."""
        for name, digest in KNOWN_KEYS.items():
            key = qr.public_key(der(name))
            self.assertEqual((hashlib.sha256(key).hexdigest(), key),
                             (digest, spki(name)))
        whole, chance = der('relay'), random.Random(1)
        broken = [whole[:size] for size in range(0, len(whole), 7)]
        for data in [b'junk', b'\x30' * 40, spki('relay')] + broken:
            self.check(ValueError, qr.public_key, data)
        for _ in range(2000):
            data = bytearray(whole)
            for _ in range(chance.randrange(1, 4)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            with contextlib.suppress(ValueError):
                self.assertIsInstance(qr.public_key(bytes(data)), bytes)

    def test_dane_usable(self):
        for selector, matching in itertools.product((0, 1), (0, 1, 2)):
            for usage, want in ((0, False), (1, False), (4, False), (3, True),
                                (2, CHAINS or selector == matching == 0)):
                self.check(want, qr.dane_usable,
                           tlsa(usage, selector, matching, 'ca'))
        for *head, data in [
                (3, 2, 1, bytes(32)), (3, 255, 1, bytes(32)),
                (3, 1, 3, bytes(32)), (3, 1, 255, bytes(32)),
                (3, 1, 1, bytes(31)), (3, 1, 1, bytes(64)),
                (3, 1, 2, bytes(32)), (3, 1, 1, b''), (2, 0, 0, b'junk'),
                (2, 0, 0, b''), (2, 0, 0, der('ca')[:40]),
                (2, 0, 0, Dane.junk()), (2, 0, 0, der('ca') + b'?'),
                (3, 0, 0, b'junk'), (3, 0, 0, spki('relay')),
                (3, 1, 0, b'junk'), (3, 1, 0, b''),
                (3, 1, 0, spki('relay')[:-1]), (3, 1, 0, spki('relay') + b'?'),
                (2, 1, 0, b'junk')]:
            self.check(False, qr.dane_usable, (*head, data))

    def test_dane_match(self):
        for way in itertools.product((2, 3), (0, 1), (0, 1, 2)):
            record = tlsa(*way, 'relay')
            changed = record[:3] + (record[3][:-1] + b'?',)
            for want, each, name in (
                    (True, record, 'relay'), (False, record, 'self'),
                    (False, changed, 'relay'),
                    (way[1] == 1, record, 'expired')):      # the same key
                self.check(want, qr.dane_match, each, der(name))
        self.check(False, qr.dane_match, tlsa(3, 1, 1, 'relay'), b'junk')

    def test_dane_check(self):
        """None if it matches, else the anchors for a second handshake: for a
        record for issuers, too, that names the server's own certificate."""
        def check(records, chain):
            try:
                return qr.dane_check(records, [der(name) for name in chain])
            except qr.TlsFailed as failed:
                return [name for name in PEM if der(name) in failed.anchors]
        ee, ta, whole = tlsa(3, 1, 1, 'relay'), tlsa(2, 1, 1, 'ca'), \
            tlsa(2, 0, 0, 'ca')
        wrong, inter = tlsa(3, 1, 1, 'self'), tlsa(2, 0, 1, 'inter')
        for records, chain, result in [
                ([ee], 'relay', None), ([wrong], 'relay', []),
                ([wrong, ee], 'relay ca', None), ([ee], 'expired', None),
                ([ee], 'self relay', []), ([], 'relay', []),
                ([tlsa(3, 1, 1, 'ca')], 'relay ca', []),
                ([ta], 'relay ca', ['ca']), ([ta], 'relay', []),
                ([whole], 'relay', ['ca']), ([whole, ee], 'relay', None),
                ([inter], 'below inter ca', ['inter']),
                ([ta, inter], 'below inter ca', ['ca', 'inter']),
                ([tlsa(2, 0, 1, 'self')], 'relay ca', [])] + [
                    ([tlsa(2, *way, 'relay')], 'relay', ['relay'])
                    for way in ((0, 0), (0, 1), (1, 1), (1, 2))]:
            self.check(result, check, records, chain.split())

    def test_is_for(self):
        """Which names a certificate is for: a row its names, a row ours."""
        for want, pairs in (
                (True, '''
                a.example               a.example
                A.Example               a.example
                a.example               b.example a.example
                b.example a.example     a.example
                *.a.example             x.a.example'''),
                (False, '''
                a.example               b.example
                a.example               x.a.example
                x.a.example             a.example
                *.a.example             a.example
                *.a.example             y.x.a.example
                *x.a.example            x.a.example
                x*.a.example            xx.a.example
                x.*.example             x.a.example
                *.example               a.example
                *                       example
                *.                      example
                *.*.example             x.a.example''')):
            for shown, names in rows(pairs):
                self.check(want, self.is_for, shown.split(),
                           names.encode().split())
        for shown, names in (
                (['a.example\0.evil.example'], [b'a.example']),
                (['\xfc.example'], [b'a.example']), ([''], []),
                (['a.example'], []), ([], []), ([], [b'a.example'])):
            self.check(False, self.is_for, shown, names)
        self.check(False, qr.is_for, {}, [b'a.example'])

    def test_pem_certificates(self):
        one, two = pem('ca').encode(), pem('self').encode()
        for data, names in [
                (b'', []), (b'nothing', []), (one, ['ca']),
                (one + two, ['ca', 'self']),
                (b'# a comment \xfc\n' + one, ['ca']),
                (one.replace(b'\n', b'\r\n'), ['ca']),
                (pem('self', key=True).encode(), ['self'])]:
            self.check([der(name) for name in names], qr.pem_certificates,
                       data)
        self.assertIn(der('self'), qr.pem_certificates(one[:200] + two))
        for size in 30, 31, 32:         # ends in no =, in two, in one
            self.check([bytes(size)], qr.pem_certificates,
                       b'-----BEGIN CERTIFICATE-----\n%s\n'
                       b'-----END CERTIFICATE-----\n'
                       % binascii.b2a_base64(bytes(size)))

    def test_dane_records(self):
        def lookup(values=(), authentic=True, status=qr.Lookup.OK):
            return qr.Lookup(status, list(values), authentic, b'')
        a, none, guessed = lookup([b'192.0.2.1']), lookup(), lookup(
            [b'192.0.2.1'], False)
        records = [tlsa(3, 1, 1, 'relay')]
        failed = lookup(status=qr.Lookup.TEMPORARY, authentic=False)
        answer, missing = lookup(records), qr.NO_TLSA
        some = qr.Tlsa(qr.Tlsa.RECORDS, records, None)
        for result, *questions in [
                (some, a, none, answer), (some, a, a, answer),
                (some, a, lookup(authentic=False), answer),
                (missing, guessed, none, answer),
                (missing, a, guessed, answer),
                (missing, a, none, lookup(records, False)),
                (missing, a, none, none),
                (missing, a, none, lookup(status=qr.Lookup.NO_NAME)),
                (qr.UNKNOWN_TLSA, a, none, failed),
                (missing, guessed, none, failed), (missing, a, none, None)]:
            self.check(result, qr.dane_records, questions[:2], questions[2])
        secure = qr.Lookup(qr.Lookup.OK, [tlsa(3, 1, 1, 'relay')] * 33, True,
                           b'\1x\0')
        self.assertEqual(qr.DNS_TLSA_MAX, len(
            qr.dane_records([secure], secure).records))

    def test_tls_reason(self):
        class Failure(ssl.SSLError):
            reason, verify_message = 'WRONG_VERSION_NUMBER', None
        verify = Failure(1, 'long words')
        verify.verify_message = 'certificate has expired'
        for error, words in [
                (Failure(1, 'long words'), b'wrong version number'),
                (verify, b'certificate has expired'),
                (ValueError('what?\n\xfc.'), b'what???'),
                (OSError(), b'TLS error')]:
            self.check(words, qr.tls_reason, error)

    def test_files(self):
        """A tlshosts file, or our certificate, that is no good."""
        def context(data, cert=None, ciphers=b''):
            qr.tls_context(qr.TlsPolicy(FILE, data),
                           qr.TlsControl(data, False, cert, ciphers))
        good, both = pem('ca').encode(), pem('ca+self').encode()
        damaged = good.replace(b'\nM', b'\n?', 2)
        for data in (good, both, b'# \xc3\xbc, \xff, a comment\n' + both,
                     both.replace(b'\n', b'\r\n'),
                     pem('self', key=True).encode()):
            self.check(None, context, data)
        for data in (b'', b'\n', b'junk', good[:300], damaged,
                     b'\xff\xfe' + good.decode().encode('utf-16-le'),
                     KEYS['self'].encode()):
            self.check(qr.NO_CONTROL, context, data)
        for ciphers in (b'nonsense', b'\xff', b'a\0b'):
            self.check(qr.NO_CONTROL, context, good, None, ciphers)
        self.check(None, context, good, None, b'HIGH')
        own = os.fsencode(pem_file('client', key=True))
        self.check(None, context, good, own)
        self.check(qr.NO_CONTROL, context, good,
                   os.fsencode(pem_file('client')))

    def test_how_weak(self):
        """Where nothing is checked, anything; elsewhere TLS 1.2 and level
        1 at least, whatever the list of ciphers says."""
        no_list, weak_list = [qr.TlsControl(None, False, None, ciphers)
                              for ciphers in (b'', b'HIGH:@SECLEVEL=0')]
        for policy, control in itertools.product(
                [IF_OFFERED, UNCHECKED, BY_SYSTEM, BY_FILE,
                 qr.TlsPolicy(DANE, []), qr.TlsPolicy(PINNED, PEM_FILE),
                 qr.TlsPolicy(ANCHORS, [der('ca')])], (no_list, weak_list)):
            context = qr.tls_context(policy, control)
            least = getattr(context, 'minimum_version', None)
            level = getattr(context, 'security_level', None)
            with self.subTest(repr((policy.level, control.ciphers))):
                if policy.verified:
                    self.assertTrue(least is None and context.options &
                                    ssl.OP_NO_TLSv1_1 or least >= 0x303)
                    self.assertTrue(level is None or level >= 1)
                else:
                    self.assertIn(least, (None, -2))
                    self.assertIn(level, (None, 0))
                    self.assertTrue(context.options & 4)
        names = [cipher['name'] for cipher in qr.tls_context(
            IF_OFFERED, no_list).get_ciphers() if
            not cipher['name'].startswith('TLS_')]
        self.assertEqual('ECDHE-ECDSA-AES256-GCM-SHA384', names[0])
        self.assertIn('AES128-SHA', names)
        self.assertFalse([name for name in names if 'PSK' in name or
                          name.startswith(('ADH', 'AECDH', 'NULL'))])
        # Damaged anchors are left out, which makes the check no easier.
        context = qr.tls_context(qr.TlsPolicy(ANCHORS, [
            b'junk', der('ca')[:40], der('ca')]), no_list)
        self.assertEqual((ssl.CERT_REQUIRED, [der('ca')]), (
            context.verify_mode, context.get_ca_certs(True)))

    def test_tls_1_2_at_most(self):
        """And the same checks."""
        control = qr.TlsControl(None, False, None, b'')
        for policy in (IF_OFFERED, BY_SYSTEM, BY_FILE):
            full = qr.tls_context(policy, control)
            context = qr.tls_context(policy, control, True)
            if hasattr(context, 'maximum_version'):
                self.assertEqual(ssl.TLSVersion.TLSv1_2,
                                 context.maximum_version)
            else:
                self.assertTrue(context.options & ssl.OP_NO_TLSv1_3)
            self.assertEqual(
                (full.verify_mode, full.check_hostname, full.verify_flags),
                (context.verify_mode, context.check_hostname,
                 context.verify_flags))

    def test_control_files_that_cannot_be_read(self):
        """Directories in their place, and links that lead nowhere: to take
        those for absent would send a password to an unchecked server."""
        name = b'relay.example'
        empty = {'tlshosts/x': b'', 'notlshosts/x': b''}
        files = ('tlshosts/relay.example.pem', 'notlshosts/relay.example',
                 'clientcert.pem', 'tlsclientciphers')
        for control in [{file + '/x': b''} for file in files] + [
                {'tlsclientciphers': b'\xef\xbb\xbfHIGH'}]:
            with Home(**control) as home, inside(home):
                self.check(qr.NO_CONTROL, qr.read_tls_control, name)
        for file in files + ('tlshosts', 'notlshosts'):
            with Home(**empty) as home, inside(home):
                self.check(False, lambda: qr.read_tls_control(name).never)
                path = os.path.join('control', file)
                shutil.rmtree(path, ignore_errors=True)
                os.symlink('/nonexistent/' + file, path)
                self.check(qr.NO_CONTROL, qr.read_tls_control, name)
        # A name of 253 bytes is one, but no file system takes more than 255
        # with .pem: no such file.
        with Home(**empty) as home, inside(home):
            for size in (240, 251, 252, 253):
                self.check(qr.TlsControl(None, False, None, b''),
                           qr.read_tls_control, b'a' * size)

    def test_tlsa_records_unknown_for_now(self):
        """No mail, unless the administrator has laid down something."""
        class Skipping:
            def skip(self, address):
                return True
        skipped = b'timed out before, not tried (qmail-tcpto)'
        for pem_data, never, note in (
                (None, False, b'TLSA lookup failed'),
                (PEM_FILE, False, skipped), (None, True, skipped),
                (PEM_FILE, True, skipped)):
            context = context_of(
                tcpto=Skipping(), tls_control=lambda name:
                qr.TlsControl(pem_data, never, None, b''))
            result = qr.ServerTry(
                qr.Server(b'127.0.0.2', 25, b'mx.example', qr.Tlsa(
                    qr.Tlsa.UNKNOWN, [], None), []),
                value_of(qr.Route), None, control_files(), context).run()
            self.assertEqual((note, True), (result.diagnostic,
                                            result.try_next))

    @staticmethod
    def is_for(shown, names):
        """is_for() with these as the DNS names; others do not count."""
        return qr.is_for({
            'subject': ((('commonName', 'a.example'),),),
            'subjectAltName': tuple(
                [('IP Address', 'a.example'), ('URI', 'a.example')] +
                [('DNS', name) for name in shown])}, names)


class OddLayer:
    """A TlsLayer in which everything is clear, and which has an answer of
    its own to each ! that comes in; t is its own talk, no word of SMTP."""

    def __init__(self):
        self.out = b''

    def encrypt(self, data):
        self.out += bytes(data)
        return True

    def decrypt(self, data=None):
        data = data or b''
        self.out += b'<answer>' * data.count(b'!')
        return data.replace(b'!', b'').replace(b't', b''), False

    def output(self):
        out, self.out = self.out, b''
        return out


class BusyLayer(OddLayer):
    """One that has to take something in before it encrypts."""
    ready = False

    def encrypt(self, data):
        if not self.ready:
            self.out += b'<hello>'
        return self.ready and OddLayer.encrypt(self, data)

    def decrypt(self, data=None):
        self.ready = True
        return OddLayer.decrypt(self, data)


class OddSocket:
    """Takes as many bytes at a time as room says, 0: none for now; gives
    what incoming says, b'': nothing for now."""

    def __init__(self, room, incoming):
        self.room, self.incoming = iter(room), iter(incoming)
        self.sent = b''

    def send(self, data):
        size = min(next(self.room), len(data))
        if not size:
            raise BlockingIOError()
        self.sent += bytes(data[:size])
        return size

    def recv(self, size):
        data = next(self.incoming)
        if not data:
            raise BlockingIOError()
        return data


class TlsLines(unittest.TestCase):
    """A Line whose TLS speaks at odd times."""

    @staticmethod
    def line(sock, clock=lambda: 0):
        line = qr.Connection(sock, lambda reading, writing, deadline: None,
                             clock)
        line.tls = OddLayer()
        return line

    def test_an_answer_never_cuts_a_record(self):
        """A renegotiation or a key update that is asked for while half of
        a record is out is answered after it."""
        sock = OddSocket([4, 0] + [99] * 9, [b'!', b'', b'', b''])
        line = self.line(sock)
        self.assertTrue(line.send(b'a record', 5, True))
        self.assertFalse(line.input_pending())
        line.send(b' and another', 5)
        self.assertEqual(sock.sent, b'a record<answer> and another')

    def test_an_answer_does_not_wait_for_us(self):
        """It leaves while we wait for a reply."""
        sock = OddSocket([99] * 9, [b'!', b'', b'250 ok\r\n'])
        self.assertEqual(self.line(sock).reply(5).code, 250)
        self.assertEqual(sock.sent, b'<answer>')

    def test_idle_talk_has_an_end(self):
        """Session tickets for ever, faster than we can read: before a
        command we do not wait for their end, and no deadline is missed."""
        def talk():
            for _ in range(20000):
                yield b't'
            raise AssertionError('without end')
        ticks = itertools.count(1)
        line = self.line(OddSocket([99] * 9, talk()),
                         lambda: next(ticks) / 100)
        self.assertFalse(line.input_pending())

    def test_encrypt(self):
        """Not without a handshake; not after nonsense."""
        layer = qr.TlsLayer(qr.tls_context(
            IF_OFFERED, qr.TlsControl(None, False, None, b'')), None)
        self.assertFalse(layer.encrypt(b'x'))
        layer.incoming.write(b'nonsense')
        self.assertRaises(qr.ConnectionLost, layer.encrypt, b'x')

    def test_new_keys_before_we_send(self):
        sock = OddSocket([99] * 9, [b'!250 '])
        line = self.line(sock)
        line.tls = BusyLayer()
        self.assertTrue(line.send(b'x', 5))
        self.assertEqual((b'<hello><answer>x', b'250 '),
                         (sock.sent, bytes(line.input)))
        for event, note in ((b'', b'connection closed'),
                            (OSError(errno.ECONNRESET, ''),
                             b'connection reset by peer')):
            line = self.line(Scripted([BlockingIOError(), event]))  # in vain
            line.tls = BusyLayer()
            with self.assertRaises(qr.ConnectionLost) as caught:
                line.send(b'a record', 5)
            self.assertEqual(note, caught.exception.diagnostic)

    def test_new_keys_without_end(self):
        self.assertFalse(self.line(OddSocket(
            [99] * 9, [b'!' * 2000, b'', b''])).input_pending())
        line = self.line(OddSocket([99] * 9, [b'!' * 2100]))
        self.assertTrue(line.input_pending())
        self.assertRaisesRegex(qr.ConnectionLost, 'without end', line.reply,
                               5)

    def test_an_answer_that_cannot_leave(self):
        """The reply counts all the same."""
        line = self.line(Scripted([b'!', BlockingIOError(), b'250 ok\r\n'],
                                  [OSError(errno.EPIPE, 'gone')]))
        self.assertEqual(line.reply(5).code, 250)

    def test_no_handshake(self):
        """A name that cannot be one, and a lost line: TLS has failed."""
        for policy, name, event, reason in (
                (IF_OFFERED, b'.example', b'', b'.example'),
                (BY_SYSTEM, b'.example', b'', b'.example'),
                (BY_SYSTEM, b'relay.example', b'', b'connection closed'),
                (IF_OFFERED, b'relay.example', OSError(
                    errno.ECONNRESET, ''), b'connection reset by peer')):
            line = self.line(Scripted([BlockingIOError(), event]))
            line.tls, context = None, qr.tls_context(
                policy, qr.TlsControl(None, False, None, b''))
            with self.assertRaises(qr.TlsFailed) as caught:
                line.start_tls(context, name, 5, bool)
            if name[:1] != b'.':
                self.assertEqual(reason, caught.exception.reason)
            self.assertIsNone(line.tls)

    def test_the_clock_of_the_handshake(self):
        """A minute, or timeoutremote if that is less; and whether silence
        may have been the reason."""
        for timeout, most in ((1200, 60), (61, 60), (60, 60), (5, 5)):
            clock = VirtualClock(step=1)
            sock = OddSocket(itertools.repeat(9999), itertools.repeat(b''))
            sock.close = lambda: None
            start = clock()
            with self.subTest(timeout):
                failed = converse_on(
                    qr.Connection(sock, clock.at_once, clock),
                    server_at(b'127.0.0.1', 465), IF_OFFERED,
                    timeoutremote=timeout).tls_failed
                self.assertEqual((b'timed out', True, most), (
                    failed.reason, failed.silent, clock() - start))

    def test_a_handshake_that_dies(self):
        """Silent only if nothing came in."""
        gone = OSError(errno.ECONNRESET, '')
        for events, silent in (
                ([BlockingIOError(), b''], True), ([b''], True),
                ([gone], True), ([BlockingIOError(), gone], True),
                ([BlockingIOError(), b'\x16\3\3', b''], False),
                ([BlockingIOError(), b'\x16', gone], False),
                ([BlockingIOError(), b'what?what?'], False)):
            line = self.line(Scripted(events))
            line.tls = None
            with self.subTest(repr(events)), \
                    self.assertRaises(qr.TlsFailed) as caught:
                line.start_tls(qr.tls_context(IF_OFFERED, qr.TlsControl(
                    None, False, None, b'')), None, 5, bool)
            self.assertEqual((silent, False), (
                caught.exception.silent, caught.exception.certificate))

    def test_a_greeting_with_the_handshake(self):
        """In TLS 1.2 it can come with the last bytes of the handshake, in
        TLS 1.3 soon after."""
        for words in 'relay+ca', 'relay+ca 1.2':
            line = self.line(DamagedServer(tls_server(words)[0], 0, b'',
                                           random.Random(1)))
            line.tls = None
            line.start_tls(qr.tls_context(
                IF_OFFERED, qr.TlsControl(None, False, None, b'')), None, 5,
                bool)
            with self.subTest(words):
                self.assertEqual(220, line.reply(5).code)

    def test_words_before_nonsense(self):
        """What was encrypted properly counts, though nothing can follow."""
        server = DamagedServer(tls_server('relay+ca 1.2')[0], 0, b'',
                               random.Random(1))
        line = self.line(server)
        line.tls = None
        line.start_tls(qr.tls_context(
            IF_OFFERED, qr.TlsControl(None, False, None, b'')), None, 5, bool)
        line.reply(5)
        server.server.write(b'250 ok\r\n')
        self.assertEqual(
            (b'250 ok\r\n', True),
            line.tls.decrypt(server.outgoing.read() + b'nonsense'))


class DamagedServer:
    """The socket of a TLS server in memory, whose bytes are damaged on
    their way: rate of them are others, and tail follows its greeting."""

    def __init__(self, context, rate, tail, chance):
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.server = context.wrap_bio(self.incoming, self.outgoing,
                                       server_side=True)
        self.rate, self.tail, self.chance = rate, tail, chance
        self.queue, self.greeted, self.patience = b'', False, 50

    def send(self, data):
        self.incoming.write(bytes(data))
        try:
            self.server.do_handshake()
            if not self.greeted:
                self.greeted = True
                self.server.write(b'220 fake\r\n')
        except ssl.SSLError:
            pass
        words = bytearray(self.outgoing.read())
        for at in range(len(words)):
            if self.chance.random() < self.rate:
                words[at] = self.chance.randrange(256)
        self.queue += bytes(words) + (self.tail if self.greeted else b'')
        return len(data)

    def recv(self, size):
        self.patience -= 1
        if not self.queue and self.patience > 0:
            raise BlockingIOError()
        data, self.queue = self.queue[:size], self.queue[size:]
        return data

    def close(self):
        pass


class TlsDamage(unittest.TestCase):
    """Whatever a server says in TLS, or instead of it, is the server's
    trouble: TLS failed, or the next server."""

    POLICIES = [IF_OFFERED, BY_FILE,
                qr.TlsPolicy(DANE, [tlsa(3, 1, 1, 'relay')]),
                qr.TlsPolicy(DANE, [tlsa(2, 0, 0, 'ca')])]

    def outcome(self, policy, server):
        """The Result of a session over TLS from the first byte."""
        ticks = itertools.count()

        def wait(reading, writing, deadline):
            if next(ticks) > 200:
                raise qr.TimedOut()
        return converse_on(
            qr.Connection(server, wait, lambda: 0),
            qr.Server(b'127.0.0.1', 465, b'relay.example', qr.NO_TLSA, []),
            policy,
            qr.Envelope(b'a@here.example', [b'b@x.example']))

    def test_nonsense_after_the_greeting(self):
        """With the last bytes of the handshake, as far as we can see."""
        for policy in self.POLICIES:
            for words in ('relay+ca', 'relay+ca 1.2'):
                server = DamagedServer(tls_server(words)[0], 0,
                                       b'nonsense', random.Random(1))
                with self.subTest(repr((policy.level, words))):
                    self.assertTrue(self.outcome(policy, server).try_next)

    def test_damage(self):
        chance = random.Random(2)
        contexts = [tls_server(words)[0]
                    for words in ('relay+ca', 'relay+ca 1.2', 'below+inter')]
        for _ in range(400 if not os.environ.get('THOROUGH') else 100000):
            server = DamagedServer(
                chance.choice(contexts), chance.choice([.0003, .001, .01]),
                bytes(chance.randrange(256) for _ in range(
                    chance.choice([0, 0, 5, 40]))), chance)
            self.assertTrue(self.outcome(chance.choice(self.POLICIES),
                                         server).try_next)


# ------------------------------------------------------------ TLS: dialogues

# Runs the program as a process, but in a context where every server listens on
# the port in control/port: so that ports 465 and 25 need no privilege; and
# where 192.0.2.x is 127.0.0.x, so that a server can be another host.
ELSEWHERE = '''
import os, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import qmail_remote as qr
os.chdir(os.environ['QMAILHOME'])
with open('control/port') as f:
    port = int(f.read())
try:
    control, words = qr.read_control(), [os.fsencode(x) for x in sys.argv[2:]]
    context = qr.make_context(
        control, qr.Message(0, control.timeoutremote))
    context.connect = lambda address, _, seconds: qr.connect(
        address.replace(b'192.0.2.', b'127.0.0.'), port, seconds)
    result = qr.deliver(words[0], words[1], words[2:], control, context)
except qr.LocalFault as fault:
    result = qr.Result(fault.report)
qr.write_output(qr.output_of(result))
'''
START = ASK + 'S: 220 go\n'
EHLO_AGAIN = 'C: EHLO me.example\n'

TLS_FAILED = 'ZConnected to 127.0.0.1 but TLS failed: '
RELAY = {('relay.example', 'A'): ['127.0.0.1']}
# As RELAY, another host: see run_here().
THERE = '192.0.2.1'
RELAY_THERE = {('relay.example', 'A'): [THERE]}
FAILED_THERE = TLS_FAILED.replace(IP, THERE)
NEEDS_TLS = ('No password is sent to this port without TLS and a certificate '
             'that can be\nverified.\n')
TLSHOSTS = 'tlshosts/relay.example.pem'
WAY_OUT = 'control/' + TLSHOSTS
ONLY_FILE = 'Only the certificates in ' + WAY_OUT


def over_tls(certificates, rest=FROM_MAIL):
    """The script of a server that takes the mail after STARTTLS."""
    return (START + 'TLS: %s\n' % certificates + EHLO_AGAIN
            + 'S: 250 fake\n' + rest)


def at_once(certificates, rest=ACCEPT):
    """The same with TLS from the first byte."""
    return 'TLS: %s\n' % certificates + rest


def accepted(checked, address=IP):
    """The report of mail that went over TLS."""
    return Like(ACCEPTED.replace(IP, address),
                'TLSv1.', ', %s\n' % checked)


class Tls(Dialogues):
    """STARTTLS, certificates, and TLS from the first byte."""

    def relay(self, title, script, *reports, **options):
        """A row where the mail goes to relay.example."""
        options['control'] = dict({
            'smtproutes': b':relay.example:PORT'},
            **options.pop('control', {}))
        options.setdefault('records', RELAY)
        return row(title, script, *reports, **options)

    def test_when_offered(self):
        unchecked = accepted('certificate not checked')
        off = OFFER + FROM_MAIL, ACCEPTED
        self.play(row(title, script, 'r', report, **options)
                  for title, script, report, options in [
            ('expired, and another name', over_tls('expired'), unchecked, {}),
            ('in small letters', over_tls('self').replace(
                '250 STARTTLS', '250 starttls'), unchecked, {}),
            ('no address as a name', over_tls('self name=-'), unchecked, {}),
            ('the name of the exchanger', {
                '127.0.0.2': over_tls('self name=mx1.there.example')},
             accepted('certificate not checked', '127.0.0.2'), {}),
            ('a big message', over_tls('self'), unchecked, dict(
                message=BIG, wire=BIG.replace(b'\n', b'\r\n'))),
            ('close_notify before the end of the line', over_tls(
                'self', FROM_MAIL.replace('Q:', 'bye')), unchecked, {}),
            ('HELO after TLS', START + 'TLS: self\n' + EHLO_AGAIN
             + 'S: 502 what?\nC: HELO me.example\nS: 250 fake\n'
             + FROM_MAIL, unchecked, {}),
            ('notlshosts', *off, dict(control={'notlshosts/127.0.0.1': b''})),
            ('a cipher that nobody likes', [
                START + 'noTLS: self 1.2 ciphers=ECDHE-ECDSA-AES256-GCM-'
                'SHA384', IN_CLEAR], in_clear(), dict(control={
                    'tlsclientciphers': CIPHER.encode()}))])
        self.play(self.relay(title, script, 'r', report, control=control)
                  for title, script, report, control in [
            ('the name of the relay', over_tls('self name=relay.example'),
             unchecked, {}),
            ('notlshosts, by name', *off, {'notlshosts/relay.example': b''}),
            ('notlshosts of another', over_tls('self'), unchecked,
             {'notlshosts/relay.example.net': b''})])

    # How TLS fails, in words for the server that offers it.  A list: it is
    # called twice, the second time with TLS 1.2 at most.
    FAILURES = [
        ('454', ASK + 'S: 454 not now\nQ:', 'STARTTLS refused: 454 not now'),
        ('5xx', ASK + 'S: 554 no\nQ:', 'STARTTLS refused: 554 no'),
        ('421', ASK + 'S: 421 closing\nQ:', 'STARTTLS refused: 421'),
        ('250', ASK + 'S: 250 ok\nQ:', 'STARTTLS refused: 250'),
        ('garbage', START + 'R: 5\nS: 500 what is that?\ndrop', ''),
        ('half a handshake', START + 'half: self', 'connection closed'),
        ('closed in the handshake', [START + 'R: 5\nclose'] * 2, ''),
        ('closed after 220', [START + 'close'] * 2, ''),
        ('reset after 220', [START + 'reset'] * 2, ''),
        ('closed instead of 220', ASK + 'close', ''),
        ('a client certificate is wanted', START + 'noTLS: self client', ''),
        ('a client certificate is wanted, TLS 1.2',
         START + 'noTLS: self client 1.2', '')]
    SHORT = {'timeoutremote': b'1'}

    def after(self, title, script, words, **options):
        """Rows for all that can follow on a failure of TLS: once more to
        the same address, in the clear; but with a password nothing, and
        nothing of it is sent; and where TLS is required nothing, too."""
        control = options.pop('control', {})
        script = [script] if isinstance(script, str) else script
        return [
            row(title, script + [IN_CLEAR], 'r', in_clear(words),
                control=control, **options),
            self.login(title + ', with a password', script, Like(
                TLS_FAILED + words, 'No password is sent in the clear'),
                control=control, **options),
            self.relay(title + ', where TLS is required', script,
                       Like(TLS_FAILED + words), control=dict(control, **{
                           TLSHOSTS: pem('self').encode()}), **options)]

    def test_failures(self):
        self.play(each for failure in self.FAILURES
                  for each in self.after(*failure))

    def test_refused_for_lack_of_tls(self):
        """Only if it was tried: the matrix has what comes of it then."""
        refuses = MAIL + 'S: 550 5.7.3 TLS\nQ:'
        no = SENDER_NO % '550 5.7.3 TLS'
        self.play([
            row('STARTTLS is not offered again', [TLS_REFUSED, TO_EHLO
                + 'S: 250 fake\n' + refuses], 'Z' + no + WHY_NO_TLS + '\n'),
            row('notlshosts', OFFER + refuses, 'Z' + no, control={
                'notlshosts/127.0.0.1': b''}),
            row('never offered', TO_EHLO + 'S: 250 fake\n' + refuses,
                'D' + no)])

    def test_deadlines(self):
        """timeoutremote counts for the whole handshake, if it is less than a
        minute, for each reply and for each part of the message."""
        def case(title, script, *reports, **options):
            return self.relay(title, script, *reports, **dict(
                options, within=6, control=dict(self.SHORT, **{
                    TLSHOSTS: pem('ca').encode()})))
        to_message = MAIL + TO_MESSAGE[len(TO_MAIL):]
        rows = self.after('silence in the handshake', [START + 'hang'] * 2,
                          'timed out', control=self.SHORT, within=6)
        rows += self.after('a dripping handshake', [
            START + 'R: 5\ndrip: \x16\x03\x03\0p' + 'x' * 100] * 2,
                           'timed out', control=self.SHORT, within=6)
        rows += [
            self.login('silence on port 465', ['hang', 'hang'], FAILED_THERE
                       + 'timed out. (#4.7.5)\n' + NEEDS_TLS, port=465,
                       trust='ca', within=6, control=self.SHORT),
            case('silence after TLS', START + 'TLS: relay\n' + EHLO_AGAIN
                 + 'hang', Like('ZConnected to ' + IP)),
            case('a reply without end', over_tls(
                'relay', MAIL + TO_END[len(TO_MAIL):]
                + 'flood: 250-more x50000000'), 'r', Like(TWICE)),
            case('a peer that stops reading in mid-message', over_tls(
                'relay', to_message + 'R: 100\nstall'), 'r', Like(DIED),
                message=BIG)]
        self.play(rows, workers=12)

    @unittest.skipUnless(getattr(ssl, 'HAS_TLSv1_3', False), 'no TLS 1.3')
    def test_a_server_that_hangs_on_a_large_hello(self):
        """Once more with TLS 1.2 at most and the same checks; only then, if
        at all, in the clear."""
        hangs = START + 'old: self'
        logs_in = EHLO_AGAIN + self.OFFERS + self.LOGS_IN

        def over_old_tls(certificates):
            return over_tls(certificates).replace('TLS:', 'old:')

        def old(checked, address=IP):
            return Like(ACCEPTED.replace(IP, address) + 'TLSv1.2, ',
                        ', %s\n' % checked)
        files = dict(self.SHORT, **{TLSHOSTS: pem('ca').encode()})
        self.play([
            row('opportunistic', [hangs, over_old_tls('self')], 'r',
                old('certificate not checked'), control=self.SHORT),
            row('in the clear at last', [hangs, START + 'half: self',
                                         IN_CLEAR], 'r', in_clear(
                    'connection closed'),
                control=self.SHORT),
            self.relay('tlshosts', [hangs, over_old_tls('relay')], 'r',
                       old('verified'), control=files),
            self.relay('tlshosts, another certificate', [
                hangs, START + 'noTLS: self', START + 'old: self\nQ:'],
                Like(TLS_FAILED, ONLY_FILE), control=files),
            self.login('a password', [hangs, START + 'old: relay\n'
                                      + logs_in], 'r', old('verified', THERE),
                       port=587, trust='ca', control=self.SHORT),
            row('DANE, an issuer', {'127.0.0.2': [
                hangs, START + 'old: relay+ca\nQ:',
                over_old_tls('relay+ca')]}, 'r', old('DANE', '127.0.0.2'),
                **signed([tlsa(2, 0, 0, 'ca')], control=self.SHORT))])

    def test_words_in_the_clear_before_tls(self):
        """What came with the 220 would pass for encrypted words."""
        attack = ASK + r's: 220 go\r\n250 AUTH PLAIN\r\n' + '\ndrop'
        self.play([
            row('given up', attack, Like('Z', IP)),
            row('the next server', {'127.0.0.2': attack,
                                    '127.0.0.3': ACCEPT}, 'r', Like(
                'K127.0.0.3', '127.0.0.2: spoke in the clear')),
            self.login('with a password', attack, Like('Z', IP))])

    def test_nothing_that_was_said_before_tls_counts(self):
        other = ASK.replace('S: 250 STARTTLS', 'S: 250-AUTH PLAIN\n'
                            'S: 250-SIZE 1\nS: 250 STARTTLS')
        before = other + 'S: 220 go\nTLS: self\n' + EHLO_AGAIN
        self.play([
            self.login('AUTH only before', before + 'S: 250 fake\n'
                       + FROM_MAIL, 'r', Like(
                'Kno supported AUTH method found, continuing without '
                'authentication.\n127.0.0.1 accepted message.\n')),
            row('STARTTLS again', before + 'S: 250-fake\nS: 250 STARTTLS\n'
                + FROM_MAIL, 'r', accepted('certificate not checked'))])

    def test_tlshosts(self):
        def case(title, certificates, trusted, checked, **options):
            """checked: what the report says; None: TLS fails, with words."""
            words = options.pop('words', ())
            options['control'] = {TLSHOSTS: trusted if isinstance(
                trusted, bytes) else pem(trusted).encode()}
            if checked is None:
                # Once more, to see whether it is the very certificate.
                return self.relay(title, [
                    START + 'noTLS: ' + certificates,
                    START + 'TLS: ' + certificates + '\nQ:'], Like(
                        TLS_FAILED, ONLY_FILE, *words), **options)
            if checked == 'odd':
                return self.relay(title, [
                    START + 'noTLS: ' + certificates,
                    over_tls(certificates)], 'r', accepted('pinned'),
                    **options)
            return self.relay(title, over_tls(certificates), 'r',
                              accepted(checked), **options)
        self.play([
            case('its CA', 'relay', 'ca', 'verified'),
            case('a CA over another', 'below+inter', 'ca', 'verified'),
            case('the CA in the middle', 'below+inter', 'inter',
                 'verified'),
            case('itself, signed by a CA', 'relay', 'relay', 'pinned'),
            case('itself, signed by itself', 'self', 'self', 'pinned'),
            case('one of several', 'self', 'ca+self', 'pinned'),
            case('with a comment in UTF-8', 'relay', 'Z\u00fcrich\n'.encode()
                 + pem('ca').encode(), 'verified'),
            case('another CA', 'relay', 'self', None),
            case('signed by itself', 'self', 'ca', None),
            case('another name', 'other', 'ca', None,
                 words=['relay.example']),
            case('expired', 'expired', 'ca', None),
            case('expired, and pinned', 'expired', 'expired', 'odd'),
            case('of another name, and pinned', 'other', 'ca+other', 'odd'),
            case('without a name, and pinned', 'client', 'client', 'odd'),
            case('another certificate of the same key', 'relay', 'expired',
                 None),
            case('the CA in the middle not shown', 'below', 'ca', None)])

    def test_tlshosts_is_the_last_word(self):
        files = {TLSHOSTS: pem('ca').encode()}
        self.play([
            self.relay('HELO only', TO_EHLO + 'S: 502 what?\nC: HELO '
                       'me.example\nS: 250 fake\nQ:', Like(
                           TLS_FAILED + 'the server does not offer STARTTLS'),
                       control=files),
            self.relay('more than notlshosts, whatever the case',
                       over_tls('relay'), 'r', accepted('verified'),
                       control=dict(files, **{
                           'smtproutes': b':Relay.EXAMPLE.:PORT',
                           'notlshosts/relay.example': b''})),
            row('by address, pinned', [START + 'noTLS: other',
                                       over_tls('other name=-')], 'r',
                accepted('pinned'), control={
                    'tlshosts/127.0.0.1.pem': pem('other').encode()}),
            row('the exchanger counts, not the host', {
                '127.0.0.2': over_tls('self')}, 'r',
                accepted('certificate not checked', '127.0.0.2'), control={
                    'tlshosts/there.example.pem': pem('ca').encode()}),
            row('the next exchanger', {'127.0.0.2': [
                START + 'noTLS: self', START + 'TLS: self\nQ:'],
                '127.0.0.3': ACCEPT}, 'r',
                Like('K127.0.0.3 accepted', '127.0.0.2: TLS failed'),
                control={
                    'tlshosts/mx1.there.example.pem': pem('ca').encode()})])

    def test_damaged_files(self):
        """One that holds nonsense defers; one that is not needed does
        not."""
        self.play([self.relay(repr(control), OFFER + 'Q:', NO_CONTROL,
                              control=control) for control in [
            {TLSHOSTS: b''}, {TLSHOSTS: b'junk'},
            {TLSHOSTS: (pem('ca') + pem('self')[:200]).encode()},
            {'clientcert.pem': pem('client').encode()},
            {'clientcert.pem': b'junk'}, {'tlsclientciphers': b'nonsense\n'}]
            ] + [
            self.relay('tlshosts of another', over_tls('self'), 'r',
                       accepted('certificate not checked'), control={
                           'tlshosts/other.example.pem': b'junk'}),
            self.relay('a server without TLS', ACCEPT, 'r', ACCEPTED,
                       control={'tlsclientciphers': b'nonsense\n'})])

    def test_own_certificate_and_ciphers(self):
        own = {'clientcert.pem': pem('client', key=True).encode()}
        cipher = 'ECDHE-ECDSA-CHACHA20-POLY1305'
        self.play([
            row('shown where it is wanted', over_tls('self client'), 'r',
                accepted('certificate not checked'), control=own),
            row('and not elsewhere', over_tls('self'), 'r',
                accepted('certificate not checked'), control=own),
            row('tlsclientciphers', over_tls('self 1.2'), 'r', Like(
                ACCEPTED + 'TLSv1.2, ' + cipher), control={
                    'tlsclientciphers': cipher.encode() + b' \n'})])

    def test_no_cipher_does_without_a_certificate(self):
        """A cipher list with ALL in it allows anonymous ciphers, which
        OpenSSL would not ask for a certificate."""
        try:
            tls_server('anonymous 1.2 ciphers=aNULL:@SECLEVEL=0')
        except (ssl.SSLError, ValueError) as e:
            self.skipTest('no anonymous ciphers here: %s' % e)
        script = START + 'TLS: anonymous 1.2 ciphers=aNULL:@SECLEVEL=0\nQ:'
        files = {'tlsclientciphers': b'ALL:@SECLEVEL=0'}
        never = script.replace('TLS: an', 'noTLS: an').replace('\nQ:', '')
        self.play([
            self.relay('tlshosts', never, Like(TLS_FAILED), control=dict(
                files, **{TLSHOSTS: pem('ca').encode()})),
            self.login('port 587', never, Like(FAILED_THERE), port=587,
                       control=files)])

    # Passwords

    USER, PASSWORD = b'joe-user', b'sec|ret:w\xc3\xb6rd'
    PLAIN64 = 'AGpvZS11c2VyAHNlY3xyZXQ6d8O2cmQ='
    USER64, PASSWORD64 = 'am9lLXVzZXI=', 'c2VjfHJldDp3w7ZyZA=='
    SECRETS = ['joe-user', 'sec|ret', 'w\u00f6rd', PLAIN64, USER64,
               PASSWORD64]
    OFFERS = 'S: 250-fake\nS: 250 AUTH CRAM-MD5 LOGIN PLAIN\n'
    LOGS_IN = 'C: AUTH PLAIN %s\nS: 235 welcome\n' % PLAIN64 + FROM_MAIL

    def login(self, title, script, *reports, **options):
        """A row where a password is for relay.example, on the port of the
        fake or, as the program sees it, on another one."""
        port = options.pop('port', None)
        options['control'] = dict(options.pop('control', {}))
        options['control'].setdefault(
            'smtproutes', b':relay.example:%s|%s|%s' % (
                b'%d' % port if port else b'PORT', self.USER, self.PASSWORD))
        options.setdefault('records', RELAY_THERE if port else RELAY)
        options.setdefault('secrets', self.SECRETS)
        return row(title, script, *reports, **options)

    def test_passwords_over_tls(self):
        hello = START + 'TLS: self\n' + EHLO_AGAIN + self.OFFERS
        sent = self.LOGS_IN.partition('S: ')[0]
        self.play([
            self.login('PLAIN comes first; what came before TLS is forgotten',
                       hello.replace('S: 250 STARTTLS', 'S: 250-AUTH LOGIN\n'
                                     'S: 250 STARTTLS') + self.LOGS_IN, 'r',
                       accepted('certificate not checked')),
            self.login('CRAM-MD5 is the last', hello.replace(' PLAIN', '')
                       + 'C: AUTH LOGIN\nS: 504 no\nC: AUTH CRAM-MD5\n'
                       'S: 535 no\nQ:', Like('Z', '535 no', 'TLSv1.')),
            self.login('echoed in a refusal', hello + sent
                       + 'S: 535 %s\nQ:' % self.PLAIN64, Like(
                           AUTH_NO % ('plain', '535 ***'), 'TLSv1.')),
            self.login('notlshosts on port 25 is the word of the '
                       'administrator', TO_EHLO + 'S: 250-AUTH PLAIN\n'
                       'S: 250-AUTH PLAIN\nS: 250 STARTTLS\n' + self.LOGS_IN,
                       'r', ACCEPTED.replace(IP, THERE), port=25,
                       control={'notlshosts/relay.example': b''})])

    def test_passwords_on_port_587(self):
        """Verified, or nothing is sent; and how to trust the relay."""
        logs_in = EHLO_AGAIN + self.OFFERS + self.LOGS_IN
        failed = Like(FAILED_THERE, NEEDS_TLS, WAY_OUT)
        pinned = {'control': {TLSHOSTS: pem('self').encode()}}
        by_address = b':192.0.2.1:587|%s|%s' % (self.USER, self.PASSWORD)
        ca, stripped = {'trust': 'ca'}, (
            FAILED_THERE + 'the server does not offer STARTTLS. (#4.7.5)\n'
            + NEEDS_TLS)
        self.play(self.login(title, script, *reports, port=587, **options)
                  for title, script, reports, options in [
            ('the system knows its CA', START + 'TLS: relay\n' + logs_in,
             ['r', accepted('verified', THERE)], ca),
            ('a CA below it', START + 'TLS: below+inter\n' + logs_in,
             ['r', accepted('verified', THERE)], ca),
            ('an unknown CA', START + 'noTLS: relay', [failed], {}),
            ('another name', START + 'noTLS: other', [failed], ca),
            ('expired', START + 'noTLS: expired', [Like(
                FAILED_THERE, 'expire' if sys.version_info >= (3, 7)
                else 'verify failed', WAY_OUT)], ca),
            ('STARTTLS is not offered', TO_EHLO + 'S: 250-fake\n'
             'S: 250 AUTH PLAIN\nQ:', [stripped], ca),
            ('HELO only', TO_EHLO + 'S: 502 what?\nC: HELO me.example\n'
             'S: 250 fake\nQ:', [stripped], ca),
            ('refused', TLS_REFUSED, [
                FAILED_THERE + 'STARTTLS refused: 454 not now. (#4.7.5)\n'
                + NEEDS_TLS], ca),
            ('half a handshake', START + 'half: relay',
             [Like(FAILED_THERE, NEEDS_TLS)], ca),
            ('pinned', START + 'TLS: self\n' + logs_in,
             ['r', accepted('pinned', THERE)], pinned),
            ('what the system trusts counts no more', [
                START + 'noTLS: relay', START + 'TLS: relay\nQ:'],
             [Like(FAILED_THERE, ONLY_FILE)], dict(ca, **pinned)),
            ('notlshosts', [], ['ZNo password is sent without TLS, '
             'but control/notlshosts/relay.example\nforbids TLS on '
             'port 587. (#4.7.5)\n'], dict(ca, control={
                 'notlshosts/relay.example': b''})),
            ('by address', START + 'noTLS: relay', [Like(
                FAILED_THERE, NEEDS_TLS, 'control/tlshosts/192.0.2.1.pem')],
             dict(ca, control={'smtproutes': by_address})),
            ('authsenders', START + 'noTLS: self', [failed], dict(
                control={'smtproutes': None, 'authsenders':
                         b'@here.example' + by_address.replace(
                             b'192.0.2.1', b'relay.example')})),
            ('no password, no check', over_tls('self'),
             ['r', accepted('certificate not checked', THERE)], dict(
                 control={'smtproutes': b':relay.example:587'}))])

    def test_port_465(self):
        """TLS from the first byte; there is nothing to fall back to."""
        failed = Like(FAILED_THERE, NEEDS_TLS, WAY_OUT)
        broken = Like(FAILED_THERE, '(#4.7.5)\n' + NEEDS_TLS, most=200)
        bare = {'control': {'smtproutes': b':relay.example:465'}}
        unchecked = ['r', accepted('certificate not checked', THERE)]
        self.play(self.login(title, script, *reports, port=465, **options)
                  for title, script, reports, options in [
            ('verified', 'TLS: relay\n' + TO_EHLO + self.OFFERS
             + self.LOGS_IN, ['r', accepted('verified', THERE)],
             {'trust': 'ca'}),
            ('an unknown CA', 'noTLS: relay', [failed], {}),
            ('half a handshake', 'half: relay', [broken], {}),
            ('closed', ['R: 5\nclose'] * 2, [broken], {}),
            ('a server in the clear', 'S: 220 fake\ndrop',
             [Like('ZConnected to ' + THERE)], {}),
            ('no password, no check', at_once('self name=relay.example'),
             unchecked, bare),
            ('no password, and TLS fails', 'half: self',
             [Like(FAILED_THERE)], bare),
            ('STARTTLS counts no more', 'TLS: self\n' + IN_CLEAR,
             unchecked, bare)])

    def test_passwords_on_other_ports(self):
        """Every port but 25 and 26 is as 587, except on this host."""
        clear = TO_EHLO + 'S: 250-fake\nS: 250 AUTH PLAIN\n'
        over = START + 'TLS: self\n' + EHLO_AGAIN + self.OFFERS + self.LOGS_IN
        taken = ACCEPTED.replace(IP, THERE)
        rows = [self.login('stripped, port %d' % port, clear + 'Q:', Like(
            FAILED_THERE + 'the server does not offer STARTTLS'), port=port)
                for port in (24, 27, 2525)]
        for port in 25, 26:
            rows += [
                self.login('in the clear, port %d' % port, clear
                           + self.LOGS_IN, 'r', taken, port=port),
                self.login('unchecked, port %d' % port, over, 'r', accepted(
                    'certificate not checked', THERE), port=port)]
        rows += [
            self.login('this host, in the clear', clear + self.LOGS_IN, 'r',
                       ACCEPTED, port=2525, records=RELAY),
            self.login('this host, and TLS fails', TLS_REFUSED,
                       Like(TLS_FAILED, 'No password is sent in the clear'),
                       port=587, records=RELAY)]
        if HAS_IPV6:
            rows.append(self.login(
                'this host, IPv6', {'::1': clear + self.LOGS_IN}, 'r',
                ACCEPTED.replace(IP, '::1'), port=2525, records={},
                control={'smtproutes': b':[::1]:2525|%s|%s' % (
                    self.USER, self.PASSWORD)}))
        self.play(rows)

    def test_names_that_are_none(self):
        """An exchanger's name with / or .. in it is never part of a path:
        these files, each of which would do harm, are not looked at."""
        def odd(label):
            """DNS with one exchanger whose first label is that."""
            name = (bytes([len(label)]) + label.encode()
                    + dns_name(HOST))

            def answer(query, question, via):
                if question.type != 'A':
                    return [dns_message(question._replace(name=''))[:12]
                            + query[12:-11] + query[-11:]]
                end = query.index(b'\0', 12) + 5
                return [struct.pack('!6H', question.id, 0x8180, 1, 1, 0, 0)
                        + query[12:end] + b'\xc0\x0c' + struct.pack(
                            '!HHIH', 1, 1, 300, 4) + bytes([127, 0, 0, 2])]
            return dict(
                records={(HOST, 'MX'): [b'\0\1' + name]},
                overrides={(label + '.' + HOST, '*'): answer})
        harm = {'me.there.example.pem': b'junk', 'tlshosts/x.pem': b'',
                'tlshosts/a/b.there.example.pem': b'junk',
                'notlshosts/a/b.there.example': b''}
        plain = accepted('certificate not checked', '127.0.0.2')
        self.play([row('label %r' % label, {
            '127.0.0.2': over_tls('self name=-')}, 'r', plain, control=harm,
            **odd(label)) for label in ('a/b', '../me', '/etc', 'a b?',
                                        '..', 'x.y')])

    def test_no_ssl_module(self):
        why = TLS_FAILED + 'this Python has no ssl module'
        there = why.replace(IP, THERE) + '. (#4.7.5)\n' + NEEDS_TLS
        log_in = TO_EHLO + 'S: 250-fake\nS: 250 AUTH PLAIN\n' + self.LOGS_IN
        self.play([
            row('in the clear', IN_CLEAR, 'r',
                ACCEPTED + 'TLS failed: this Python has no ssl module, '
                'sent in the clear\n', command=python(WITHOUT % 'ssl')),
            row('in the clear, refused', OFFER + MAIL
                + 'S: 554 5.7.1 no\nQ:', 'Z' + SENDER_NO % '554 5.7.1 no'
                + 'TLS failed: this Python has no ssl module\n',
                has_ssl=False),
            self.relay('where TLS is required', OFFER + 'Q:', Like(why),
                       has_ssl=False, control={
                           TLSHOSTS: pem('ca').encode()})]
            + [self.login(title, script, *reports, has_ssl=False, **options)
               for title, script, reports, options in [
                ('STARTTLS is offered', OFFER + 'Q:', [Like(
                    why, 'No password is sent in the clear')], {}),
                ('STARTTLS is not offered', log_in, ['r', ACCEPTED], {}),
                ('port 2525', OFFER + 'Q:', [there], {'port': 2525}),
                ('port 465', 'Q:', [there], {'port': 465})]]
            + [row('DANE', {'127.0.0.2': OFFER + 'Q:'}, Like(
                why.replace(IP, '127.0.0.2')), **signed(
                    [tlsa(3, 1, 1, 'relay')], has_ssl=False))])


# ------------------------------------------------------------ TLS: DANE

MX1, MX2 = 'mx1.' + HOST, 'mx2.' + HOST
TLSA1 = '_25._tcp.' + MX1


class Tickets(unittest.TestCase):
    """Sessions resumed by a process that delivers more than once."""

    def deliveries(self, count, connections, trust=None, other=None,
                   cache=None):
        """[(text of the report, what the server saw of TLS)] of deliveries
        by one process.  The server keeps its ticket keys; trust is what
        tlshosts says, other an address for every second delivery."""
        cache, kept = cache or qr.TlsCache(), {}

        class Server(FakeSMTP):
            @staticmethod
            def context(text):
                return kept.setdefault(text, tls_server(text))
        with Server(connections) as server, \
                tempfile.TemporaryFile() as body:
            body.write(MESSAGE)
            body.flush()
            context = context_of(
                tcpto=qr.TcpTo(b'/nonexistent', time.time, 1, qr.wait),
                connection=qr.Connection, tls_context=cache.context,
                tls_cache=cache,
                tls_control=lambda name: qr.TlsControl(
                    trust, False, None, b''),
                connect=lambda address, port, seconds: qr.connect(
                    IP.encode(), server.port, seconds))
            reports = []
            for turn in range(count):
                os.lseek(body.fileno(), 0, os.SEEK_SET)
                context.message = qr.Message(body.fileno())
                name = other if other and turn % 2 else IP.encode()
                result = qr.ServerTry(
                    qr.Server(IP.encode(), 25, name, qr.NO_TLSA, []),
                    value_of(qr.Route), qr.Envelope(
                        SENDER.encode(), [RECIPIENTS[0].encode()]),
                    control_files(), context).run()
                reports.append(result.report + result.tls_summary)
        self.assertIsNone(server.error, server.transcript)
        parts = '\n'.join(server.transcript).split('-- connection')
        return reports, ['resumed' if '-- resumed' in part else
                         'full' if '-- TLS with' in part else 'none'
                         for part in parts]

    def check(self, want, *args, **options):
        reports, seen = self.deliveries(*args, **options)
        self.assertEqual(want, ' '.join(seen))
        for report in reports:
            self.assertTrue(report.startswith(b'K'), report)
        return reports

    def test_resumed(self):
        """With TLS 1.3 and 1.2, checked or not; the report says the same."""
        for words in 'relay+ca', 'relay+ca 1.2':
            for trust, checked in ((None, b', certificate not checked\n'),
                                   (PEM['ca'].encode(), b', verified\n'),
                                   (PEM['relay'].encode(), b', pinned\n')):
                with self.subTest('%s%s' % (words, checked)):
                    for report in self.check(
                            'full resumed resumed', 3, [over_tls(words)] * 3,
                            trust=trust):
                        self.assertTrue(report.endswith(checked), report)

    def test_another_name(self):
        """What was proved for one name proves nothing for another."""
        self.check('full full resumed resumed', 4,
                   [over_tls('relay+ca')] * 4, other=b'relay.example')

    CHOKING = START + 'R: 5\nS: 500 what?\ndrop'

    def test_a_server_that_chokes_on_tickets(self):
        """One more connection over TLS without; never into the clear."""
        self.check('full none full resumed', 3,
                   [over_tls('relay+ca'), self.CHOKING] +
                   [over_tls('relay+ca')] * 2)

    def test_two_connections_at_most(self):
        """A ticket that is refused counts as the first; the next delivery,
        which has none, may go on in the clear."""
        reports, _ = self.deliveries(3, [
            over_tls('relay+ca'), self.CHOKING, self.CHOKING, self.CHOKING,
            IN_CLEAR])
        self.assertEqual([b'K', TLS_FAILED[:1].encode(), b'K'],
                         [report[:1] for report in reports])

    @unittest.skipUnless(getattr(ssl, 'HAS_TLSv1_3', False), 'no TLS 1.3')
    def test_who_hangs_is_remembered(self):
        """TLS 1.2 at most from then on: with a ticket, too, and never more
        than two connections again."""
        closes = START + 'close'
        reports = self.check('full none full resumed', 3, [
            over_tls('relay+ca'), closes,
            over_tls('relay+ca').replace('TLS:', 'old:'),
            over_tls('relay+ca').replace('TLS:', 'old:')])
        self.assertEqual([b'TLSv1.3', b'TLSv1.2', b'TLSv1.2'], [
            report.split(b'\n')[2].split(b',')[0] for report in reports])
        self.check('none none none none none', 2, [
            closes, closes, IN_CLEAR, closes, IN_CLEAR])

    def test_a_session_that_cannot_be_kept(self):
        """OpenSSL's form of it has a limit, which a certificate with 2,400
        names exceeds; the message is delivered all the same."""
        class Cache(qr.TlsCache):
            def keep_session(self, key, session):
                raise ValueError('too long')
        self.check('full full', 2, [over_tls('relay+ca')] * 2,
                   cache=Cache())

    def test_a_lost_key(self):
        """A server that has forgotten its keys: a whole handshake."""
        self.check('full full', 2, [over_tls('relay+ca'),
                                    over_tls('relay+ca -')])

    def test_contexts(self):
        """Kept, but not for DANE, and not without end."""
        cache = qr.TlsCache()
        plain = qr.TlsControl(None, False, None, b'')
        with_ciphers = qr.TlsControl(None, False, None, b'HIGH')
        self.assertIs(cache.context(IF_OFFERED, plain),
                      cache.context(IF_OFFERED, plain))
        self.assertIsNot(cache.context(IF_OFFERED, plain),
                         cache.context(IF_OFFERED, with_ciphers))
        for policy in (qr.TlsPolicy(DANE, [tlsa(3, 1, 1, 'relay')]),
                       qr.TlsPolicy(ANCHORS, [])):
            self.assertIsNot(cache.context(policy, plain),
                             cache.context(policy, plain))
        for number in range(3 * qr.TLS_KEPT):
            cache.context(IF_OFFERED, qr.TlsControl(
                None, False, None, b'HIGH:' + b'@STRENGTH:' * number))
        self.assertLessEqual(len(cache.contexts), qr.TLS_KEPT)


def signed(records, unsigned=(), **options):
    """Options of a row: HOST with the exchangers of converse(), in a zone
    whose answers have the AD bit, but for unsigned ones, (name, type); and
    these TLSA records for the first.  The mail goes by MX on port 25."""
    zone = exchangers(['127.0.0.2', '127.0.0.3'][:options.pop('count', 1)])
    if records:
        zone[TLSA1, 'TLSA'] = records
    overrides = {(name, '*'): {'ad': True} for name, _ in zone}
    overrides.update({place: {'ad': False} for place in unsigned})
    overrides.update(options.pop('overrides', {}))
    control = {'smtproutes': None}
    control.update(options.pop('control', {}))
    return dict({'records': zone, 'overrides': overrides,
                 'control': control}, **options)


class Dane(Dialogues):
    """RFC 7672, with a name server on loopback, which may be trusted."""

    FIRST = '127.0.0.2'
    NO_MATCH = Like(TLS_FAILED.replace(IP, FIRST)
                    + 'no TLSA record matches the certificate. (#4.7.5)\n')
    FAILED = Like(TLS_FAILED.replace(IP, FIRST))
    GOOD = accepted('DANE', FIRST)
    UNCHECKED = accepted('certificate not checked', FIRST)
    PLAIN = ACCEPTED.replace(IP, FIRST)

    def case(self, title, script, records, *reports, **options):
        return row(title, {self.FIRST: script}, *reports,
                   **dict(signed(records, **options)))

    @staticmethod
    def looked_at(certificates):
        """A server whose certificate does not please, once it is known."""
        return START + 'TLS: %s\nQ:' % certificates

    def rows(self, *cases):
        """cases: title, script, TLSA records, reports, options"""
        self.play(self.case(title, script, records, *reports, **options)
                  for title, script, records, reports, options in cases)

    def test_usage_3(self):
        """The server's own certificate, whatever its name and age."""
        good, bad = ['r', self.GOOD], [self.NO_MATCH]
        self.rows(*[
            ('3 %d %d' % way, over_tls('relay name=' + MX1),
             [tlsa(3, *way, 'relay')], good, {})
            for way in ((0, 0), (1, 1), (0, 2))] + [
            ('wrong', self.looked_at('relay'), [tlsa(3, 1, 1, 'self')], bad,
             {}),
            ('expired', over_tls('expired'), [tlsa(3, 1, 1, 'expired')],
             good, {}),
            ('of another name', over_tls('other'), [tlsa(3, 0, 1, 'other')],
             good, {}),
            ('one of several', over_tls('self'), [
                tlsa(3, 1, 1, 'relay'), tlsa(0, 0, 1, 'ca'),
                tlsa(3, 1, 2, 'self')], good, {}),
            ('its issuer is not it', self.looked_at('relay+ca'),
             [tlsa(3, 1, 1, 'ca')], bad, {}),
            ('an unusable one does not help', self.looked_at('relay'),
             [tlsa(3, 1, 1, 'self'), tlsa(1, 1, 1, 'relay'), b'\3\1'], bad,
             {}),
            ('one that is too short does no harm', over_tls('self'),
             [b'\3\1', tlsa(3, 1, 1, 'self'), b''], good, {})])

    def alias(self, title, script, at_target, at_alias, *reports, **options):
        """A row whose exchanger is an alias, with these TLSA records."""
        target = 'mail.dane.example'
        options = signed(at_alias, **options)
        zone = options['records']
        zone[target, 'A'] = zone.pop((MX1, 'A'))
        zone[MX1, 'CNAME'] = [target]
        if at_target:
            zone['_25._tcp.' + target, 'TLSA'] = at_target
        for name in (target, '_25._tcp.' + target):
            options['overrides'].setdefault((name, '*'), {'ad': True})
        return row(title, {self.FIRST: script}, *reports, **options)

    def test_aliases(self):
        """The records of the name that an alias stands for come first, and
        then it is that name that is asked for and checked (RFC 7672 2.2.2).
        """
        right, wrong = [tlsa(3, 1, 1, 'relay')], [tlsa(3, 1, 1, 'self')]
        target, good = 'name=mail.dane.example', ['r', self.GOOD]
        soft = {('_25._tcp.mail.dane.example', '*'): {'rcode': 2}}
        self.play(self.alias(str(number), script, at_target, at_alias,
                             *reports, **options)
                  for number, (script, at_target, at_alias, reports, options)
                  in enumerate([
            (over_tls('relay ' + target), right, wrong, good, {}),
            (over_tls('relay name=' + MX1), [], right, good, {}),
            (self.looked_at('relay'), wrong, right, [self.NO_MATCH], {}),
            ([self.looked_at('relay+ca'), over_tls('relay+ca ' + target)],
             [tlsa(2, 0, 0, 'ca')], [], good, {}),
            (None, right, [], [Like('Z', 'TLSA')], {'overrides': soft})]))

    def test_usage_2(self):
        """An issuer: two connections, the second with it as the only
        anchor; name and age count."""
        rows = []
        for way in [(0, 0)] + [(1, 1), (0, 2)] * CHAINS:
            right = tlsa(2, *way, 'ca')
            for title, certificates, record, good in (
                    ('right', 'relay+ca', right, True),
                    ('two levels', 'below+inter+ca', right, True),
                    ('in the middle', 'below+inter', tlsa(2, *way, 'inter'),
                     True),
                    ('another name', 'other+ca', right, False),
                    ('expired', 'expired+ca', right, False),
                    ('it signed nothing', 'self+ca', right, False)):
                script = [self.looked_at(certificates), over_tls(certificates)
                          if good else START + 'noTLS: ' + certificates]
                rows.append(('2 %d %d, ' % way + title, script, [record],
                             ['r', self.GOOD] if good else [self.FAILED], {}))
            if way != (0, 0):
                rows.append(('%d %d not shown' % way, self.looked_at('relay'),
                             [right], [self.NO_MATCH], {}))
        rows.append(('2 0 0, not shown, beside one that is no good',
                     [self.looked_at('relay'), over_tls('relay')],
                     [tlsa(2, 0, 0, 'ca'), (2, 0, 0, self.junk())],
                     ['r', self.GOOD], {}))
        if not CHAINS:
            rows.append(('2 1 1 is unusable here', over_tls('self'),
                         [tlsa(2, 1, 1, 'ca')], ['r', self.UNCHECKED], {}))
        self.rows(*rows)

    @staticmethod
    def junk():
        """What looks like a certificate from afar."""
        data = bytearray(der('self'))
        data[data.index(b'\x55\x04\x03') - 2] ^= 0x20
        return bytes(data)

    def test_no_way_around_it(self):
        """Usable records decide; unusable ones require TLS, unchecked."""
        useless = [(1, 1, 1, bytes(32)), (2, 0, 0, self.junk()), b'\3\1']
        right = [tlsa(3, 1, 1, 'relay')]
        self.rows(*[
            (title, script, records, [self.FAILED], {})
            for records in (right, useless) for title, script in (
                ('not offered', TO_EHLO + 'S: 250 fake\nQ:'),
                ('refused', TLS_REFUSED),
                ('garbage', START + 'R: 5\nS: 500 what?\ndrop'),
                ('half a handshake', START + 'half: self'))] + [
            ('unusable', over_tls('self'), useless, ['r', self.UNCHECKED],
             {}),
            ('tlshosts is stronger', over_tls('self'), right,
             ['r', accepted('pinned', self.FIRST)], dict(control={
                 'tlshosts/%s.pem' % MX1: pem('self').encode()})),
            ('notlshosts, too', OFFER + FROM_MAIL, right, ['r', self.PLAIN],
             dict(control={'notlshosts/' + MX1: b''}))])
        self.play([row('the next exchanger', {
            self.FIRST: self.looked_at('self'), '127.0.0.3': ACCEPT},
            'r', Like('K127.0.0.3', '127.0.0.2: TLS failed: no TLSA'),
            **signed(right, count=2))])

    def test_unknown_for_now(self):
        """TLSA failing means: not this host."""
        fails = {'overrides': {(TLSA1, 'TLSA'): {'rcode': 2}}}
        self.play([row('the next one', {
            self.FIRST: [], '127.0.0.3': ACCEPT}, 'r', Like(
                'K127.0.0.3 accepted message.\n',
                '127.0.0.2: TLSA lookup failed\n'),
            **signed([], count=2, overrides={(TLSA1, 'TLSA'): what}))
            for what in ({'rcode': 2}, lambda query, question, via: [
                dns_message(question, [dns_record(
                    TLSA1, 'TLSA', b'\3\1')])[:-1]])])
        self.rows(
            ('no other one', [], [], [
                "ZSorry, I couldn't look up the TLSA records of "
                'mx1.there.example. (#4.4.3)\n'], fails),
            ('a relay', [], [], [Like('Z', 'TLSA')], dict(
                fails, control=self.BY_NAME)),
            ('the address is not signed', ACCEPT, [], ['r', self.PLAIN],
             dict(fails, unsigned=[(MX1, 'A')])),
            ('there is none', over_tls('self'), [], ['r', self.UNCHECKED],
             {}))

    BY_NAME = {'smtproutes': b':mx1.there.example:25'}

    @staticmethod
    def at_port(port, certificate='relay'):
        """Options: the TLSA record of MX1 for that port."""
        name = '_%d._tcp.%s' % (port, MX1)
        return {'overrides': {(name, 'TLSA'): lambda query, question, via: [
            dns_message(question, [dns_record(
                name, 'TLSA', tlsa(3, 1, 1, certificate))], 0x81A0)]}}

    def test_only_with_ad(self):
        """Without AD on all the way: as if there was no TLSA record.  A
        relay given by name is asked for like an exchanger (RFC 7672 2.2.2),
        from what the administrator wrote on."""
        right, wrong = [tlsa(3, 1, 1, 'relay')], [tlsa(3, 1, 1, 'self')]
        good, unchecked = ['r', self.GOOD], ['r', self.UNCHECKED]
        by_name = {'control': self.BY_NAME}
        login = self.base64(b'\0ann\0opensesame')
        with_password = START + 'TLS: self\n' + EHLO_AGAIN + (
            'S: 250-fake\nS: 250 AUTH PLAIN\nC: AUTH PLAIN %s\n'
            'S: 235 ok\n' % login) + FROM_MAIL
        self.rows(*[
            ('%s %s is not signed' % place[::-1], over_tls('relay'), wrong,
             unchecked, {'unsigned': [place]})
            for place in [(HOST, 'MX'), (MX1, 'A'), (TLSA1, 'TLSA')]] + [
            ('a host without MX', over_tls('relay'), [], good,
             dict(self.at_port(25), host=MX1)),
            ('on another port', over_tls('relay'), [], good, dict(
                self.at_port(2525), control={'smtproutes': b'::2525'})),
            ('a relay', over_tls('relay'), right, good, by_name),
            ('a relay, wrong', self.looked_at('relay'), wrong,
             [self.NO_MATCH], by_name),
            ('a relay that is not signed', over_tls('self'), wrong,
             unchecked, dict(by_name, unsigned=[(MX1, 'A')])),
            ('its records are not', over_tls('relay'), wrong, unchecked,
             dict(by_name, unsigned=[(TLSA1, 'TLSA')])),
            ('an exchanger is not, but is not asked for', over_tls('relay'),
             right, good, dict(by_name, unsigned=[(HOST, 'MX')])),
            ('a relay by address', over_tls('relay'), wrong, unchecked,
             {'control': {'smtproutes': b':127.0.0.2:25'}}),
            ('a relay with a password', with_password, [], good, dict(
                self.at_port(587, 'self'), control={
                    'smtproutes':
                    b':mx1.there.example:587|ann|opensesame'}))])

    @staticmethod
    def base64(data):
        return binascii.b2a_base64(data)[:-1].decode()

    def test_secure_aliases_of_insecure_names(self):
        """Then the CNAME is asked for by itself, and if that is authentic,
        the alias has the TLSA records."""
        right, wrong = [tlsa(3, 1, 1, 'relay')], [tlsa(3, 1, 1, 'self')]
        unsigned = [(MX1, 'A'), (MX1, 'AAAA')]
        good, unchecked = ['r', self.GOOD], ['r', self.UNCHECKED]
        soft, cname = [Like('Z', 'TLSA')], {(MX1, 'CNAME'): {'rcode': 2}}
        self.play(self.alias(title, script, at_target, at_alias, *reports,
                             unsigned=unsigned + more, **options)
                  for title, script, at_target, at_alias, reports, more,
                  options in [
            ('right', over_tls('relay name=' + MX1), wrong, right, good, [],
             {}),
            ('wrong', self.looked_at('relay'), [], wrong, [self.NO_MATCH],
             [], {}),
            ('none', over_tls('self'), wrong, [], unchecked, [], {}),
            ('the alias is not signed either', over_tls('relay'), [], wrong,
             unchecked, [(MX1, 'CNAME')], {}),
            ('the alias is for now unknown', [], [], right, soft, [],
             dict(overrides=cname)),
            ('it is, but nothing is at it', over_tls('self'), [], [],
             unchecked, [], dict(overrides=cname)),
            ('a relay', self.looked_at('relay'), [], wrong, [self.NO_MATCH],
             [], dict(control=self.BY_NAME))])

    def test_next_hop(self):
        """With usage 2 a certificate for the recipient's domain is as good
        as one for the exchanger (RFC 7672 3.2.2); no third name is."""
        def case(title, domain, certificate, *reports, alias=None,
                 **options):
            options = signed([tlsa(2, 0, 0, 'ca')], **options)
            zone = options['records']
            zone[domain, 'MX'] = zone.pop((HOST, 'MX'))
            if alias:
                zone[alias, 'CNAME'] = [domain]
            for name in filter(None, (domain, alias)):
                options['overrides'].setdefault((name, '*'), {'ad': True})
            good = over_tls(certificate + ' name=' + MX1)
            bad = START + 'TLS: %s\nQ:' % certificate
            return row(title, {self.FIRST: [self.looked_at(certificate),
                                            good if reports else bad]},
                       *reports or [self.FAILED], host=alias or domain,
                       **options)
        good = 'r', self.GOOD
        self.play([
            case('the domain', 'other.example', 'other+ca', *good),
            case('the exchanger', 'other.example', 'relay+ca', *good),
            case('the domain, in capitals', 'OTHER.example', 'other+ca',
                 *good),
            case('an alias of the domain', 'nowhere.example', 'other+ca',
                 *good, alias='other.example'),
            case('what the domain stands for', 'other.example', 'other+ca',
                 *good, alias='alias.example'),
            case('another one', 'another.example', 'other+ca'),
            case('below it', 'sub.other.example', 'other+ca'),
            case('above it', 'example', 'other+ca')])


# ------------------------------------------------------------ Real peers
# Servers that others wrote.  The scripted peers above show that the program
# does what we think is right; these show that others agree.
# REAL_PEERS=required, as .ci/run sets it, turns a peer that is missing into a
# failure.

USER = b'user'
PASSWORD = 'p\xe4ss:w|rd'.encode('utf-8')


def missing(why):
    """Skips the tests of a peer, or fails where the peer is required."""
    if os.environ.get('REAL_PEERS') == 'required':
        raise AssertionError(why)
    raise unittest.SkipTest(why)


def find_program(*names):
    """The path of the first program of these that is installed."""
    path = os.environ.get('PATH', os.defpath) + ':/usr/sbin:/usr/local/sbin'
    for name in names:
        found = shutil.which(name, path=path)
        if found:
            return found
    return missing('%s is not installed' % names[0])


def free_ports(count):
    """TCP ports of 127.0.0.1 that nobody uses, chosen by the kernel."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind(('127.0.0.1', 0))
        return [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


class Peer:
    """A real server in a temporary directory and a process group of its own,
    with one port of 127.0.0.1 for each of its roles.  find() gives the start
    of its command line; configure() writes its files and gives the rest."""

    roles = ('',)

    def __init__(self):
        self.command = self.find()
        self.path = tempfile.mkdtemp(prefix='peer-')
        self.log = os.path.join(self.path, 'log')
        self.child = None
        atexit.register(self.stop)
        for _ in range(3):      # a port may be taken before the peer has it
            self.ports = dict(zip(self.roles, free_ports(len(self.roles))))
            if self.start(self.configure(), 15):
                return
        with open(self.log, errors='replace') as f:
            words = f.read()[-500:]
        self.stop()
        missing('%s does not start: %s' % (self.command[0], words))

    def write(self, name, text):
        path = os.path.join(self.path, name)
        with open(path, 'w', encoding='utf-8') as f:
            f.write(text)
        return path

    def start(self, arguments, seconds):
        """Starts the server; says whether it listens on all its ports."""
        with open(self.log, 'ab') as log:
            self.child = subprocess.Popen(
                self.command + arguments, cwd=self.path, stdout=log,
                stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT,
                start_new_session=True)
        end = time.monotonic() + seconds
        waiting = list(self.ports.values())
        while waiting and self.child.poll() is None and \
                time.monotonic() < end:
            try:
                socket.create_connection(('127.0.0.1', waiting[0]), 5).close()
                del waiting[0]
            except OSError:
                time.sleep(0.02)
        if not waiting and self.child.poll() is None:
            return True
        self.end_processes()
        return False

    def end_processes(self):
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.child and self.child.returncode is None:
                with contextlib.suppress(subprocess.TimeoutExpired,
                                         ProcessLookupError):
                    os.killpg(self.child.pid, number)
                    self.child.wait(5)

    def stop(self):
        """Safe to call twice; at the end of all tests it is."""
        self.end_processes()
        shutil.rmtree(self.path, ignore_errors=True)
        atexit.unregister(self.stop)


class PeerTest(unittest.TestCase):
    """The tests of a Peer, which is started once for all of them."""

    @classmethod
    def setUpClass(cls):
        cls.peer = cls.kind()

    @classmethod
    def tearDownClass(cls):
        cls.peer.stop()


# Both mail servers judge alike.  A local part of `refused` means 550 and
# `later` 451, of the sender at MAIL, of a recipient at RCPT; recipients
# `message-refused` and `message-later` mean it for the message, and, at Exim
# alone, `data-refused` and `data-later` for DATA.  Their ports: one that is
# open to all; those named after a mechanism, which offer that one alone and
# take no recipient without it; starttls, and tls, which begins with TLS, both
# with PLAIN and the certificate `relay`.  Exim speaks TLS by GnuTLS,
# aiosmtpd by Python's ssl.

EXIM = r"""
primary_hostname = peer.example
exim_user = %(uid)d
exim_group = %(gid)d
spool_directory = %(path)s
log_file_path = %(path)s/%%slog
pid_file_path = %(path)s/pid
local_interfaces = 127.0.0.1
daemon_smtp_ports = %(ports)s
daemon_startup_retries = 0
disable_ipv6
keep_environment =
.ifdef _HAVE_I18N
smtputf8_advertise_hosts = *
.endif
tls_advertise_hosts = ${if eq{$received_port}{%(starttls)d}{*}}
tls_certificate = %(path)s/relay.pem
tls_privatekey = %(path)s/relay.pem
tls_on_connect_ports = %(tls)d

# A message stays in the spool, as it came.
queue_only
received_header_text =
return_path_remove = false
delivery_date_remove = false
envelope_to_remove = false

acl_smtp_mail = mail
acl_smtp_rcpt = rcpt
acl_smtp_predata = predata
acl_smtp_data = data

begin acl
judge:
  deny    condition = ${if eq{$acl_arg1}{refused}}
          message = not wanted
  defer   condition = ${if eq{$acl_arg1}{later}}
          message = come back later
  accept
mail:
  require acl = judge $sender_address_local_part
  accept
rcpt:
  deny    condition = ${if inlist{$received_port}{%(closed)s}}
          !authenticated = *
          message = 530 5.7.0 authentication wanted
  require acl = judge $local_part
  accept  control = dkim_disable_verify
          set acl_m_fate = $local_part
predata:
  require acl = judge ${sg{$acl_m_fate}{^data-}{}}
  accept
data:
  require acl = judge ${sg{$acl_m_fate}{^message-}{}}
  accept

begin authenticators
plain:
  driver = plaintext
  public_name = PLAIN
  server_advertise_condition = ${if or{{eq{$received_port}{%(PLAIN)d}} \
    {def:tls_in_cipher}}}
  server_prompts = :
  server_condition = ${if and{{eq{$auth2}{%(user)s}}{eq{$auth3}{%(pass)s}}}}
login:
  driver = plaintext
  public_name = LOGIN
  server_advertise_condition = ${if eq{$received_port}{%(LOGIN)d}}
  server_prompts = Username:: : Password::
  server_condition = ${if and{{eq{$auth1}{%(user)s}}{eq{$auth2}{%(pass)s}}}}
cram:
  driver = cram_md5
  public_name = CRAM-MD5
  server_advertise_condition = ${if eq{$received_port}{%(CRAM-MD5)d}}
  server_secret = ${if eq{$auth1}{%(user)s}{%(pass)s}fail}
"""


class Exim(Peer):
    """Started by root it changes to nobody, else it stays what it is."""

    roles = ('', 'starttls', 'tls', 'PLAIN', 'LOGIN', 'CRAM-MD5')

    def find(self):
        return [find_program('exim4', 'exim')]

    def configure(self):
        uid, gid = os.getuid(), os.getgid()
        if uid == 0:
            uid, gid = 65534, 65534
            os.chown(self.path, uid, gid)
        self.write('relay.pem', pem('relay', key=True))
        ports = list(map(str, self.ports.values()))
        return ['-bdf', '-C', self.write('exim.conf', EXIM % dict(
            self.ports, uid=uid, gid=gid, path=self.path, ports=' : '.join(
                ports), closed=':'.join(ports[3:]), user=USER.decode(), **{
                    'pass': PASSWORD.decode('utf-8')}))]

    def idents(self):
        spool = os.path.join(self.path, 'input', '*-D')
        return {os.path.basename(path)[:-2] for path in glob.glob(spool)}

    def holds(self, ident, message):
        """Says whether that is what it stored.  The spool keeps the body in
        ID-D after one line, and the header in ID-H after a blank line, each
        field with its length and a flag (`*`: not part of the message).  It
        does not keep whether a blank line stood between the two."""
        base = os.path.join(self.path, 'input', ident)
        with open(base + '-D', 'rb') as f:
            body = f.read().partition(b'\n')[2]
        with open(base + '-H', 'rb') as f:
            fields = f.read().partition(b'\n\n')[2]
        header = b''
        while fields:
            length, flag = re.match(br'(\d+)(\D) ', fields).groups()
            start = len(length) + 2
            end = start + int(length)
            header += b'' if flag == b'*' else fields[start:end]
            fields = fields[end:]
        return message in (header + body, header + b'\n' + body)


AIOSMTPD = r"""
import asyncio, itertools, os, ssl, sys
from aiosmtpd.smtp import SMTP, AuthResult, LoginPassword

WORDS = {'refused': '550 not wanted', 'later': '451 come back later'}
ACCOUNT = LoginPassword(*map(os.fsencode, sys.argv[1:3]))
numbers = itertools.count(1)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain('relay.pem')


class LongLines(SMTP):
    line_length_limit = 1 << 20


class Handler:
    def __init__(self, role):
        self.role = role

    async def handle_MAIL(self, server, session, envelope, address, options):
        envelope.mail_from = address
        return WORDS.get(address.partition('@')[0], '250 ok')

    async def handle_RCPT(self, server, session, envelope, address, options):
        if self.role.isupper() and not session.authenticated:
            return '530 5.7.0 authentication wanted'
        word = WORDS.get(address.partition('@')[0], '250 ok')
        if word[0] == '2':
            envelope.rcpt_tos.append(address)
        return word

    async def handle_DATA(self, server, session, envelope):
        for address in envelope.rcpt_tos:
            fate = address.partition('@')[0].replace('message-', '')
            if fate in WORDS:
                return WORDS[fate]
        ident = str(next(numbers))
        with open(os.path.join('mail', ident), 'wb') as f:
            f.write(envelope.original_content)
        return '250 OK id=' + ident


def authenticate(server, session, envelope, mechanism, account):
    return AuthResult(success=account == ACCOUNT, handled=False)


async def listen(loop, role, port):
    await loop.create_server(lambda: LongLines(
        Handler(role), hostname='peer.example', loop=loop,
        auth_require_tls=False, authenticator=authenticate,
        tls_context=context if role == 'starttls' else None,
        auth_exclude_mechanism={'PLAIN', 'LOGIN'} - {
            role if role.isupper() else role and 'PLAIN'}),
        '127.0.0.1', port, ssl=context if role == 'tls' else None)


loop = asyncio.new_event_loop()
asyncio.set_event_loop(loop)
os.makedirs('mail', exist_ok=True)
for argument in sys.argv[3:]:
    role, _, port = argument.partition(':')
    loop.run_until_complete(listen(loop, role, int(port)))
loop.run_forever()
"""


class Aiosmtpd(Peer):
    """In a process of the first Python here that can import it."""

    roles = Exim.roles[:-1]

    def find(self):
        for python in (sys.executable, '/usr/bin/python3'):
            if os.path.exists(python) and subprocess.call(
                    [python, '-c', 'import aiosmtpd.smtp'],
                    stderr=subprocess.DEVNULL) == 0:
                return [python]
        return missing('aiosmtpd is not installed')

    def configure(self):
        self.write('relay.pem', pem('relay', key=True))
        return [self.write('server.py', AIOSMTPD), USER, PASSWORD] + [
            '%s:%d' % role for role in self.ports.items()]

    def idents(self):
        return set(os.listdir(os.path.join(self.path, 'mail')))

    def holds(self, ident, message):
        """Says whether that is what it stored, which is the wire form
        without the dots."""
        with open(os.path.join(self.path, 'mail', ident), 'rb') as f:
            return f.read() == message.replace(b'\n', b'\r\n')


DISLIKED = b'127.0.0.1 does not like recipient.'
NO = b'\nRemote host said: 550 not wanted\n'
LATER = b'\nRemote host said: 451 come back later\n'
NOT_HIM, HIM_LATER = b'h' + DISLIKED + NO, b's' + DISLIKED + LATER
NO_LOGIN = b's' + DISLIKED + b'\nRemote host said: 530 5.7.0 ' \
    b'authentication wanted\n'
GOOD = b'K127.0.0.1 accepted message.\nRemote host said: 250 OK id=ID\n'
GIVING_UP = b'Giving up on 127.0.0.1.\n'
NOT_FROM = b'Connected to 127.0.0.1 but sender was rejected.'
AFTER = b'127.0.0.1 failed after I sent the message.'

# Local parts of the sender and of the recipients; reports.
PEER_ANSWERS = [
    ('sender', 'joe', [b'r', GOOD]),
    ('sender', 'joe jim', [b'r', b'r', GOOD]),
    ('refused', 'joe', [b'D' + NOT_FROM + NO]),
    ('later', 'joe', [b'Z' + NOT_FROM + LATER]),
    ('sender', 'refused', [NOT_HIM, b'D' + GIVING_UP]),
    ('sender', 'later', [HIM_LATER, b'Z' + GIVING_UP]),
    ('sender', 'refused later', [NOT_HIM, HIM_LATER, b'Z' + GIVING_UP]),
    ('sender', 'later joe refused', [HIM_LATER, b'r', NOT_HIM, GOOD]),
    ('sender', 'message-refused', [b'r', b'D' + AFTER + NO]),
    ('sender', 'message-later', [b'r', b'Z' + AFTER + LATER]),
    ('sender', ' '.join(['joe', 'refused', 'joe'] * 100),
     [b'r', NOT_HIM, b'r'] * 100 + [GOOD])]

# The step of each mechanism at which a wrong password is refused.
REFUSED_AT = {'PLAIN': b'plain', 'LOGIN': b'password',
              'CRAM-MD5': b'username+digest'}

# A body that tries to end itself and to send another message, in every way
# that one server or another has taken for an end of the data.
SMUGGLER = b'Subject: one\n\n' + b''.join(
    end + b'MAIL FROM:<sender@sender.example>\r\nRCPT TO:<joe@peer.example>'
    b'\r\nDATA\r\nSubject: two\r\n\r\ntwo\r\n'
    for end in (b'\n.\n', b'\n.\r\n', b'\r.\r', b'\r.\n', b'\r\n.\r',
                b'\r\n.\r\n', b'\r\r\n.\r\r\n'))
COMMANDS_ALONE = (b'RSET\nMAIL FROM:<sender@sender.example>\n'
                  b'RCPT TO:<joe@peer.example>\nDATA\n\ntwo\n.\n')
ODD_MESSAGES = [
    SMUGGLER, b'', b'\n', b'.\n', b'..\n.\n\n.x\n', b'\n\n\n',
    b'Subject: \xe4\n\n\0\xff\n', b'a: b\n\n' + b'x' * 70000 + b'\n',
    b'a: b\n\n' + b'.y\n' * 50000]


def samples():
    """The messages of the standard library's own tests of email, from the
    first Python here that has them: as bytes, each with a final newline."""
    for place in [sysconfig.get_paths()['stdlib']] + sorted(
            glob.glob('/usr/lib/python3*') +
            glob.glob('/usr/local/lib/python3*')):
        found = []
        for path in glob.glob(place + '/test/test_email/data/*'):
            with open(path, 'rb') as f:
                data = f.read()
            found.append(data if data.endswith(b'\n') else data + b'\n')
        if found:
            return found
    return missing("no Python here has the standard library's tests")


class MailServer:
    """The tests that every mail server has to pass."""

    answers = PEER_ANSWERS

    def run_mail(self, role='', sender='sender', recipients='joe', login=b'',
                 message=MESSAGE, **control):
        """The Outcome of a delivery to a port."""
        port = b'%d' % self.peer.ports[role]
        control.setdefault('smtproutes', b':127.0.0.1:%s%s' % (
            b'465' if role == 'tls' else port, login))
        with Home(port=port, **control) as home:
            outcome = run_program(
                home, 'peer.example', sender + '@sender.example',
                *[name + '@peer.example' for name in recipients.split()],
                message=message,
                command=python(ELSEWHERE) if role == 'tls' else None)
        self.assertEqual((0, b''), (outcome.status, outcome.stderr))
        return outcome

    def mail(self, *args, **options):
        """The reports, without what differs: the message's name, and which
        TLS it is."""
        return [re.sub(br'TLSv1\.[23], [A-Z0-9_-]+', b'TLS', re.sub(
            br'id=\S+', b'id=ID', report)) for report in self.run_mail(
                *args, **options).reports]

    def difference(self, message, role=''):
        """Sends a message; '', or what differs at the other side from the
        message with CRLF and CR made line ends."""
        outcome = self.run_mail(role, message=message)
        ident = re.search(br'accepted message[^\0]*id=(\S+)', outcome.output)
        if not ident:
            return '%r: %r' % (message[:60], outcome.output)
        lines = message.replace(b'\r\n', b'\n').replace(b'\r', b'\n')
        return '' if self.peer.holds(ident.group(1).decode(), lines) else \
            '%r: stored otherwise' % message[:60]

    def test_answers(self):
        for sender, recipients, reports in self.answers:
            with self.subTest(sender + ' ' + recipients[:20]):
                self.assertEqual(reports, self.mail('', sender, recipients))

    def test_authentication(self):
        right, wrong = b'|%s|%s' % (USER, PASSWORD), b'|%s|Wr0ng' % USER
        for role in self.peer.roles[3:]:
            relay = b':127.0.0.1:%d' % self.peer.ports[role]
            with self.subTest(role):
                for control in (
                        {'login': right}, {'authsenders': right},
                        {'authsenders': b'.example' + relay + right}):
                    self.assertEqual([b'r', GOOD], self.mail(role, **control))
                self.assertEqual([NO_LOGIN, b'Z' + GIVING_UP],
                                 self.mail(role))
                report, = self.mail(role, login=wrong)
                self.assertTrue(report.startswith(
                    b'ZConnected to 127.0.0.1 but authentication was rejected'
                    b' (%s).\nRemote host said: 535' % REFUSED_AT[role]))
                self.assertNotIn(b'Wr0ng', report)

    def test_tls(self):
        login, path = b'|%s|%s' % (USER, PASSWORD), 'tlshosts/127.0.0.1.pem'
        for role in 'starttls', 'tls':
            for trusted, words in (
                    ('ca', b'verified'), ('relay', b'pinned'),
                    (None, b'certificate not checked'), ('self', None)):
                control = {path: pem(trusted).encode()} if trusted else {}
                if trusted != 'relay' and trusted:
                    control['login'] = login
                with self.subTest(role, trusted=trusted):
                    reports = self.mail(role, **control)
                    if words:
                        self.assertEqual(
                            [b'r', GOOD + b'TLS, %s\n' % words], reports)
                    else:
                        self.assertTrue(reports[0].startswith(
                            b'ZConnected to 127.0.0.1 but TLS failed: '))

    def test_messages(self):
        """Nothing in a message is obeyed; what arrives is what was sent."""
        for role in self.peer.roles[:3]:
            for message in ODD_MESSAGES:
                before = self.peer.idents()
                with self.subTest(message[:20], role=role):
                    self.assertEqual('', self.difference(message, role))
                    self.assertEqual(1, len(self.peer.idents() - before))
        before = self.peer.idents()
        for sender, recipient in ('sender', 'refused'), ('refused', 'joe'):
            self.mail('', sender, recipient, message=COMMANDS_ALONE)
        time.sleep(0.1)
        self.assertEqual(before, self.peer.idents())

    def test_real_messages(self):
        messages = samples()
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            differences = list(filter(None, pool.map(
                self.difference, messages)))
        print('%s: %d real messages, %d differences' % (
            self.kind.__name__, len(messages), len(differences)),
            file=sys.stderr)
        self.assertEqual(differences, [])

    def offered(self):
        """The keywords of the answer to EHLO."""
        with socket.create_connection(
                ('127.0.0.1', self.peer.ports['']), 5) as sock, \
                sock.makefile('rw', newline='\r\n') as f:
            f.readline()
            f.write('EHLO me.example\r\nQUIT\r\n')
            f.flush()
            return {line[4:].split()[0].upper() for line in f}

    def test_addresses_in_utf_8(self):
        """Taken if it offers SMTPUTF8, and never sent if not."""
        offered = self.offered()
        self.assertLessEqual(self.keywords, offered)
        eight = b'D127.0.0.1 does not take non-ASCII addresses'
        for sender, recipient in (('m\u00fcller', 'j\u00f6rg'), (
                'm\u00fcller', 'joe'), ('sender', 'j\u00f6rg')):
            words = b"" if sender == 'sender' else b", such as the sender's"
            self.assertEqual(
                [b'r', GOOD] if 'SMTPUTF8' in offered else
                [eight + words + b'. (#5.6.7)\n'], self.mail(*[
                    os.fsdecode(name.encode()) for name in (
                        '', sender, recipient)]))

    def test_as_qmail_rspawn(self):
        """Several deliveries by one process, later ones with a ticket; and
        recipients of each fate in one session."""
        port = collections.namedtuple('Port', 'port')(
            self.peer.ports['starttls'])
        with QmailSend(port) as qmail:
            for _ in range(3):
                qmail.send(*[(number, name + b'@peer.example') for number, name
                             in enumerate((b'one', b'refused', b'two',
                                           b'later'))])
                for delnum, text in sorted(qmail.reports(4)):
                    self.assertEqual(b'KDKZ'[delnum], text[0], text)
                    self.assertIn(b', certificate not checked\n', text)
            self.assertEqual((b'', 0), qmail.end())


class EximTest(MailServer, PeerTest):
    kind = Exim
    keywords = {'SIZE', '8BITMIME', 'PIPELINING'}
    answers = PEER_ANSWERS + [
        ('sender', 'data-refused', [
            b'r', b'D127.0.0.1 failed on DATA command.' + NO]),
        ('sender', 'data-later', [
            b'r', b'Z127.0.0.1 failed on DATA command.' + LATER])]


class AiosmtpdTest(MailServer, PeerTest):
    kind = Aiosmtpd
    keywords = {'SIZE', '8BITMIME'}


class RspawnTest(unittest.TestCase):
    """The qmail-rspawn of a notqmail (1.08 or later) at $QMAIL_HOME, run as
    qmailr as qmail-start does.  It takes root, writes one message into that
    queue for a moment, and clears its tcpto."""

    ANSWERS = (
        (ACCEPT, ACCEPTED),
        (TO_RCPT + 'S: 550 no\nQ:', 'D127.0.0.1 does not like recipient.\n'
         'Remote host said: 550 no\nGiving up on 127.0.0.1.\n'),
        (TO_RCPT + 'S: 450 no\nQ:', 'Z127.0.0.1 does not like recipient.\n'
         'Remote host said: 450 no\nGiving up on 127.0.0.1.\n'),
        ('hang', DIED))

    def setUp(self):
        self.qmail = os.environ.get('QMAIL_HOME')
        if not self.qmail or os.getuid():
            self.skipTest('no $QMAIL_HOME, or not root')
        self.place = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.place)
        os.chmod(self.place, 0o755)
        message = os.path.join(self.qmail, 'queue/mess/0/999999937')
        with open(message, 'wb') as f:
            f.write(MESSAGE)
        self.addCleanup(os.unlink, message)
        owner = os.stat(os.path.join(self.qmail, 'queue/mess'))
        os.chown(message, owner.st_uid, owner.st_gid)
        os.chmod(message, 0o644)

    def spawn(self, home):
        user = pwd.getpwnam('qmailr')

        def become_qmailr():
            os.setgroups([])
            os.setgid(user.pw_gid)
            os.setuid(user.pw_uid)
            os.umask(0o77)
        # Who may not execute a file can be given it by an open descriptor.
        program = os.open(os.path.join(self.qmail, 'bin/qmail-rspawn'),
                          os.O_RDONLY)
        self.addCleanup(os.close, program)
        return subprocess.Popen(
            ['/proc/self/fd/%d' % program], pass_fds=[program],
            preexec_fn=become_qmailr, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={
                'QMAILREMOTE': shutil.copy(PROGRAM, self.place),
                'QMAILHOME': home.path,
                'PATH': bin_with_python3() + ':/usr/bin:/bin'})

    def test_verdicts(self):
        servers = [FakeSMTP(script) for script, _ in self.ANSWERS]
        routes = '\n'.join('h%d.example:%s' % (number, server.address)
                           for number, server in enumerate(servers))
        with Home(smtproutes=routes.encode(), timeoutremote=b'2') as home:
            subprocess.check_call(['chmod', '-R', 'a+rX', home.path])
            child = self.spawn(home)
            output, _ = child.communicate(b''.join(
                b'%c0/999999937\0%s\0r@h%d.example\0' % (
                    number, SENDER.encode(), number)
                for number in range(len(servers))), timeout=30)
        for server in servers:
            server.close()
        # After the number of deliveries: delivery number, report, NUL.
        reports = [b'%c%s' % (number, report.encode()) for number, (
            _, report) in enumerate(self.ANSWERS)]
        self.assertEqual((0, sorted(reports)), (child.returncode, sorted(
            re.findall(b'(?s)(.[^\0]+)\0', output[1:]))))


# For servers that have not been touched for years: openssl dhparam 1024.
DH_1024 = '''\
-----BEGIN DH PARAMETERS-----
MIGHAoGBAPHhFilOwQTRDSP8GOTD5e3I1QZq1EJ5Nw0rkdrEuPwGXEv1YOUeU2vZ
VwTIN999Utl/Pek4BIiaR67QyUGCF4IcpkbdrqCZQjKJyCUTil0jladvUl9pLu+8
FlSBvm+YAeTMEzY7aYhypuNn9YAGwQnn48QtPRILVgqfDBm5C4BXAgEC
-----END DH PARAMETERS-----
'''


class OpenSslTest(unittest.TestCase):
    """`openssl s_server` can ask for new keys, and for a renegotiation, in
    the middle of a dialogue; and it can be an old server."""

    # What it says, and how the line starts that it waits for then; @ is a
    # command of s_server.
    SCRIPT = [('220 fake', b'EHLO'), ('@', None), ('250 fake', b'MAIL'),
              ('@', None), ('250 ok', b'RCPT'), ('@', None),
              ('250 ok', b'DATA'), ('@', None), ('354 go', b'.\r'),
              ('@', None), ('250 queued', b'QUIT')]

    def talk(self, options, letter, certificate, **control):
        """(reports, lines of the server) of a delivery."""
        port, = free_ports(1)
        server = subprocess.Popen(
            [find_program('openssl'), 's_server', '-accept',
             '127.0.0.1:%d' % port, '-cert', certificate, '-crlf',
             '-naccept', '1'] + options.split(), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            cwd=os.path.dirname(certificate))
        seen, lines = [], iter(server.stdout.readline, b'')
        try:
            while not next(lines).startswith(b'ACCEPT'):
                pass
            with Home(smtproutes=b':127.0.0.1:465', port=b'%d' % port,
                      **control) as home, \
                    concurrent.futures.ThreadPoolExecutor() as pool:
                outcome = pool.submit(
                    run_program, home, HOST, SENDER, RECIPIENTS[0],
                    command=python(ELSEWHERE))
                # Until it has given up, perhaps:
                with contextlib.suppress(StopIteration, BrokenPipeError):
                    self.play(server.stdin, lines, letter, seen)
                return outcome.result(20).reports, seen
        finally:
            server.kill()
            server.communicate()

    def play(self, mouth, ear, letter, seen):
        for words, answer in self.SCRIPT:
            if words == '@' and not letter:
                continue
            mouth.write(words.replace('@', letter).encode() + b'\n')
            mouth.flush()
            if words == '@':
                time.sleep(0.03)            # it reads one command at a time
            while answer:
                seen.append(next(ear))
                if seen[-1].startswith(answer):
                    break

    def test_new_keys(self):
        """With and without our own.  We refuse a renegotiation, where Python
        lets us (3.7); then this server ends the connection."""
        certificate = pem_file('relay', key=True)
        for letter in 'Kk':
            reports, seen = self.talk('-tls1_3', letter, certificate)
            self.assertEqual(['r', Like(ACCEPTED + 'TLSv1.3')], [
                report.decode() for report in reports])
            self.assertIn(b'Hello, world.\r\n', seen)
        for letter in 'rR':
            report = self.talk('-tls1_2', letter, certificate)[0][-1]
            self.assertEqual(Like(
                DIED if hasattr(ssl, 'OP_NO_RENEGOTIATION') else ACCEPTED),
                report.decode())

    # Options of s_server, and the protocol and cipher that come of them.
    OLD_SERVERS = [
        ('-tls1_2 -cipher AES128-SHA:@SECLEVEL=0', 'TLSv1.2, AES128-SHA'),
        ('-tls1_2 -cipher ECDHE-RSA-AES256-SHA:@SECLEVEL=0',
         'TLSv1.2, ECDHE-RSA-AES256-SHA'),
        ('-tls1_2 -cipher DHE-RSA-AES256-GCM-SHA384:@SECLEVEL=0 '
         '-dhparam dh', 'TLSv1.2, DHE-RSA-AES256-GCM-SHA384'),
        ('-tls1 -cipher ALL:@SECLEVEL=0', 'TLSv1, ')]

    def test_old_servers(self):
        """Where nothing is checked, weak TLS beats none; where something
        is, TLS 1.0 does not."""
        folder = tempfile.mkdtemp(prefix='old-')
        self.addCleanup(shutil.rmtree, folder)
        certificate, key, dh = [os.path.join(folder, name)
                                for name in ('certificate', 'key', 'dh')]
        subprocess.check_call(
            [find_program('openssl'), 'req', '-x509', '-newkey', 'rsa:2048',
             '-nodes', '-subj', '/CN=old.example', '-days', '2', '-keyout',
             key, '-out', certificate], stderr=subprocess.DEVNULL)
        with open(certificate, 'a') as f, open(key) as key_file, \
                open(dh, 'w') as dh_file:
            f.write(key_file.read())
            dh_file.write(DH_1024)
        for options, words in self.OLD_SERVERS:
            with self.subTest(options):
                report = self.talk(options, '', certificate)[0][-1]
                self.assertEqual(Like(
                    ACCEPTED + words, ', certificate not checked\n'),
                    report.decode())
        with open(certificate, 'rb') as f:
            report, = self.talk(options, '', certificate, **{
                'tlshosts/127.0.0.1.pem': f.read()})[0]
        self.assertEqual(Like(TLS_FAILED), report.decode())


# DNS.  knot signs the zones example and bogus, once; then bogus is changed
# behind its back, and knot serves them as they are.  unbound trusts the keys.

KNOT = """
server:
    rundir: "%(path)s"
    listen: 127.0.0.1@%(port)d
database:
    storage: "%(path)s/keys"
log:
  - target: stderr
    any: warning
policy:
  - id: once
    algorithm: ecdsap256sha256
    single-type-signing: on
template:
  - id: default
    storage: "%(path)s"
    file: "%%s.zone"
    zonefile-load: whole
    zonefile-sync: %(sync)d
    journal-content: none
zone:
  - domain: example
    %(signing)s
  - domain: bogus
    %(signing)s
  - domain: unsigned.example
"""

START_OF_ZONE = """
$TTL 300
@             SOA    ns hostmaster 1 3600 900 604800 300
@             NS     ns
ns            A      127.0.0.1
"""


def tlsa_text(*what):
    """A TLSA record as text."""
    return '%d %d %d %s' % (*what[:3], binascii.hexlify(
        tlsa(*what)[3]).decode())


# broken.example is served by an address that unbound never asks.
SIGNED_ZONE = START_OF_ZONE + """
unsigned      NS     ns.unsigned
ns.unsigned   A      127.0.0.1
broken        NS     ns
mx            MX     10 a
a             A      127.0.0.2
six           AAAA   ::1
six-mx        MX     10 six
both          A      127.0.0.2
both          AAAA   ::1
cname         CNAME  mx
cname-a       CNAME  cname-six
cname-six     CNAME  six
cname-mx      MX     10 cname-a
next          MX     10 a.broken
next          MX     20 a
text          TXT    "no address"
text-mx       MX     10 text
lost-mx       MX     10 nobody
broken-mx     MX     10 a.broken
null          MX     0 .
none          MX     10 mx.none
mx.none       A      127.0.0.2
second        MX     10 mx.bogus.
second        MX     20 mx.right
alias         MX     10 mx.alias
mx.alias      CNAME  mx.unsigned
alias-wrong   MX     10 mx.alias-wrong
mx.alias-wrong  CNAME  mx.unsigned
*._tcp.mx.alias        TLSA  """ + tlsa_text(3, 1, 1, 'relay') + """
*._tcp.mx.alias-wrong  TLSA  """ + tlsa_text(3, 1, 1, 'self') + """
mx2.there     MX     10 mx.next-hop
""" + ''.join("""
%(name)s      MX     10 %(mx)s
%(mx)s        A      127.0.0.2
*._tcp.%(mx)s TLSA   %(tlsa)s
""" % {'name': name, 'mx': mx, 'tlsa': tlsa_text(*what)}
    for name, mx, what in [
        ('right', 'mx.right', (3, 1, 1, 'relay')),
        ('whole', 'mx.whole', (3, 0, 2, 'relay')),
        ('wrong', 'mx.wrong', (3, 1, 1, 'self')),
        ('useless', 'mx.useless', (0, 0, 1, 'relay')),
        ('issuer', 'relay', (2, 0, 0, 'ca')),
        ('issuer-key', 'mail.dane', (2, 1, 1, 'ca')),
        ('issuer-wrong', 'mx1.there', (2, 0, 0, 'self')),
        ('issuer-name', 'mx.issuer-name', (2, 0, 0, 'ca')),
        ('next-hop', 'mx.next-hop', (2, 0, 0, 'ca'))])
OTHER_ZONE = START_OF_ZONE + """
@             MX     10 mx
mx            A      127.0.0.3
*._tcp.mx     TLSA   """ + tlsa_text(3, 1, 1, 'relay') + '\n'
ZONES = {'example': SIGNED_ZONE, 'bogus': OTHER_ZONE,
         'unsigned.example': OTHER_ZONE.replace('.3\n', '.2\n').replace(
             tlsa_text(3, 1, 1, 'relay'), tlsa_text(3, 1, 1, 'self')) +
         ''.join('many MX %d m%d.many\nm%d.many A 127.0.3.%d\n' % (
             i, i, i, i) for i in range(120, 0, -1))}


class Knot(Peer):
    def find(self):
        return [find_program('knotd')]

    def configure(self):
        os.makedirs(os.path.join(self.path, 'keys'), exist_ok=True)
        for name, text in ZONES.items():
            self.write(name + '.zone', text)
        self.write_conf('dnssec-signing: on\n    dnssec-policy: once', 0)
        if not self.start(['-c', 'sign.conf'], 15):
            return ['-c', 'sign.conf']          # the log says why
        end = time.monotonic() + 15
        while not all('RRSIG' in self.zone(name) for name in (
                'example', 'bogus')) and time.monotonic() < end:
            time.sleep(0.02)
        self.end_processes()
        right, wrong = ('%064X' % (int(hashlib.sha256(
            spki('relay')).hexdigest(), 16) ^ bit) for bit in (0, 1))
        text = self.zone('bogus')
        if right not in text.upper():
            raise ValueError('no TLSA record in the signed zone')
        self.write('bogus.zone', re.sub(right, wrong, text, flags=re.I))
        self.write_conf('', -1)
        return ['-c', 'sign.conf']

    def write_conf(self, signing, sync):
        self.write('sign.conf', KNOT % {
            'path': self.path, 'port': self.ports[''], 'signing': signing,
            'sync': sync})

    def zone(self, name):
        with open(os.path.join(self.path, name + '.zone')) as f:
            return f.read()

    def anchors(self):
        """The keys of the signed zones, for a resolver that trusts them."""
        return ''.join(
            line + '\n' for name in ('example', 'bogus')
            for line in self.zone(name).splitlines()
            if re.match(r'\S+\s+(\d+\s+)?(IN\s+)?DNSKEY\s+257 ', line))


UNBOUND = """
server:
  interface: 127.0.0.1@%(port)d
  username: ""
  chroot: ""
  directory: "%(path)s"
  pidfile: ""
  use-syslog: no
  do-daemonize: no
  do-not-query-localhost: no
  do-not-query-address: 192.0.2.1
  module-config: "validator iterator"
  trust-anchor-file: "%(path)s/anchors"
remote-control:
  control-enable: no
stub-zone:
  name: "broken.example"
  stub-addr: 192.0.2.1
""" + ''.join("""
stub-zone:
  name: "%s"
  stub-addr: 127.0.0.1@%%(knot)d
""" % name for name in ZONES)


class Unbound(Peer):
    """A validating resolver for the zones of a Knot.  The program is copied,
    since AppArmor, where it is at work, keeps /usr/sbin/unbound from reading
    a temporary directory."""

    def find(self):
        self.knot = Knot()
        return [find_program('unbound')]

    def configure(self):
        copy = os.path.join(self.path, 'unbound')
        if self.command != [copy]:
            self.command = [shutil.copy(self.command[0], copy)]
        self.write('anchors', self.knot.anchors())
        return ['-d', '-c', self.write('unbound.conf', UNBOUND % {
            'port': self.ports[''], 'path': self.path,
            'knot': self.knot.ports['']})]

    def stop(self):
        self.knot.stop()
        super().stop()


TAKEN = over_tls('relay+ca')
LOOKED_AT = START + 'TLS: relay+ca\nQ:'
NOT_TAKEN = START + 'noTLS: relay+ca'
NOT_CHECKED = 'certificate not checked'
NO_ADDRESS = "DSorry, I couldn't find a mail exchanger or IP address. " \
    '(#5.4.4)\n'
NO_TLSA = "ZSorry, I couldn't look up the TLSA records of mx.bogus. " \
    '(#4.4.3)\n'

# Host (.example), the address that takes the mail in the clear, or the report
# of a run that ends before it connects.
DNS_CASES = [
    ('mx', '127.0.0.2'), ('a', '127.0.0.2'), ('both', '127.0.0.2'),
    ('cname', '127.0.0.2'), ('next', '127.0.0.2'),
    ('many.unsigned', '127.0.3.1'), ('six', '::1'), ('six-mx', '::1'),
    ('cname-a', '::1'), ('cname-mx', '::1'),
    ('nobody', "DSorry, I couldn't find any host named nobody.example. "
     '(#5.1.2)\n'),
    ('text', NO_ADDRESS), ('text-mx', NO_ADDRESS), ('lost-mx', NO_ADDRESS),
    ('x.broken', NO_HOST_NOW), ('broken-mx', NO_HOST_NOW),
    ('null', 'DSorry, null.example does not accept mail. (#5.1.10)\n')]

# Host (.example; or the relay), how the server ends, what the report says of
# TLS; None: TLS fails.
DANE_CASES = [
    ('right', [TAKEN], 'DANE'), ('whole', [TAKEN], 'DANE'),
    ('issuer', [LOOKED_AT, TAKEN], 'DANE'),
    ('issuer-key', [LOOKED_AT, TAKEN] if CHAINS else [TAKEN],
     'DANE' if CHAINS else NOT_CHECKED),
    ('none', [TAKEN], NOT_CHECKED), ('useless', [TAKEN], NOT_CHECKED),
    ('unsigned', [TAKEN], NOT_CHECKED), ('second', [TAKEN], 'DANE'),
    ('alias', [TAKEN], 'DANE'), ('alias-wrong', [LOOKED_AT], None),
    ('mx2.there', [LOOKED_AT, TAKEN], 'DANE'),
    ('next-hop', [LOOKED_AT, NOT_TAKEN], None), ('wrong', [LOOKED_AT], None),
    ('issuer-wrong', [LOOKED_AT, NOT_TAKEN], None),
    ('issuer-name', [LOOKED_AT, NOT_TAKEN], None),
    (b'mx.right', [TAKEN], 'DANE'), (b'mx.alias', [TAKEN], 'DANE'),
    (b'mx.wrong', [LOOKED_AT], None), (b'mx.none', [TAKEN], NOT_CHECKED),
    (b'mx.unsigned', [TAKEN], NOT_CHECKED)]


class DnsTest(PeerTest):
    """Mail by MX, and DANE, through a validating unbound, with zones signed
    by knot.  An smtproutes line with a port alone sends mail to where the
    zone says, but not to port 25."""

    kind = Unbound

    def mail(self, host, script=(), address='127.0.0.2', relay=b''):
        """The reports, of a delivery to that address, by MX or by way of a
        relay."""
        mine = ['::1', '127.0.0.2', '127.0.0.3', '127.0.3.0/24']
        try:
            sink = FakeSMTP(script, address)
        except OSError as e:
            self.skipTest('no address %s here: %s' % (address, e))
        with sink, Home(smtproutes=b':%s:%d' % (relay, sink.port),
                        notipme='\n'.join(mine).encode()) as home:
            outcome = run_program(
                home, host, SENDER, RECIPIENTS[0],
                dns='127.0.0.1:%d' % self.peer.ports[''])
            sink.close()
        self.assertEqual((sink.error, outcome.stderr), (None, b''))
        return [report.decode() for report in outcome.reports]

    def test_dns(self):
        for host, want in DNS_CASES:
            with self.subTest(host):
                here = re.fullmatch('[0-9.:]+', want)
                self.assertEqual(
                    ['r', ACCEPTED.replace(IP, want)] if here else [want],
                    self.mail(host + '.example', ACCEPT if here else [],
                              want if here else IP))

    def test_dane(self):
        for host, script, checked in DANE_CASES:
            with self.subTest(host):
                reports = self.mail(host + '.example', script) if isinstance(
                    host, str) else self.mail('there.example', script,
                                              relay=host + b'.example')
                self.assertEqual(
                    ['r', accepted(checked, '127.0.0.2')] if checked else
                    [Like(TLS_FAILED.replace(IP, '127.0.0.2'))], reports)

    def test_bogus(self):
        """Changed on its way: unbound says SERVFAIL, and the host is left
        alone."""
        self.assertEqual([NO_TLSA], self.mail('bogus', [], '127.0.0.3'))
        self.assertEqual([NO_TLSA], self.mail(
            'there.example', [], '127.0.0.3', b'mx.bogus'))
        self.assertIn('127.0.0.3: TLSA lookup failed\n', self.mail(
            'second.example', [TAKEN])[1])

    def test_120_exchangers(self):
        """The answer has no room in a datagram; the order is right."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(5)
            sock.connect(('127.0.0.1', self.peer.ports['']))
            sock.send(qr.build_question(
                1, dns_name('many.unsigned.example'), 15, True))
            self.assertTrue(sock.recv(1500)[2] & 2)
        report, = self.mail('many.unsigned.example')
        self.assertEqual(Like(UNREACHED), report)
        self.assertEqual(['127.0.3.%d' % i for i in range(1, 21)],
                         re.findall('(?m)^([0-9.]+): ', report))


# ------------------------------------------------------------ Demo
# `python3 test_qmail_remote.py demo`: some deliveries by the real program,
# shown and checked.  Needs no root, no network and no qmail.

LETTERS = {'r': 'recipient accepted', 's': 'recipient refused for now',
           'h': 'recipient refused for good',
           'K': 'the server has taken the message',
           'Z': 'message failed for now', 'D': 'message failed for good'}
VERDICTS = {'K': 'delivered', 'Z': 'deferred, it will be tried again',
            'D': 'failed, it bounces to the sender'}

DEMO_MESSAGE = (b'From: <ann@here.example>\nTo: <bob@there.example>\n'
                b'Subject: hello\n\nHello, Bob.\n.A dot opens this line.\n')
DEMO_ARGS = ['there.example', 'ann@here.example', 'bob@there.example']
DEMO_LOGIN = binascii.b2a_base64(b'\0ann\0opensesame')[:-1].decode()
DEMO_RECORDS = {('there.example', 'MX'): [(10, 'mx.there.example')],
                ('mx.there.example', 'A'): ['127.0.0.1']}


def demo_script(offer, *more, end='''S: 250 recipient ok
        C: DATA\nS: 354 go ahead\nD:\nS: 250 queued as 4711\nQ:'''):
    """A server that offers this, does more, and ends so after RCPT."""
    ehlo = 'C: EHLO me.example\nS: 250-mx.there.example\nS: 250 '
    return ('S: 220 mx.there.example ESMTP\n' + ehlo + offer + '\n' + ''.join(
        step.replace('EHLO', ehlo) + '\n' for step in more) +
        'C: MAIL FROM:<ann@here.example>\nS: 250 sender ok\n'
        'C: RCPT TO:<bob@there.example>\n' + end)


DEMO_AUTH = 'C: AUTH PLAIN %s\nS: 235 welcome' % DEMO_LOGIN
DEMO_TAKEN = ('r\0K127.0.0.1 accepted message.\n'
              'Remote host said: 250 queued as 4711\n')
DEMO_ACCOUNT = b'@here.example:127.0.0.1:PORT|ann|opensesame\n'

# Title, control files (PORT stands for the scripted server's), script,
# reports.
SCENES = [
    ('A route in smtproutes: no DNS, this relay takes the mail.',
     {'smtproutes': b'there.example:127.0.0.1:PORT\n'},
     demo_script('8BITMIME'), DEMO_TAKEN),
    ('No relay: the Domain Name System names the mail exchanger.\n'
     '(The route only moves it to a port that needs no root; notipme\n'
     'lets 127.0.0.1 count as another host.)',
     {'smtproutes': b'::PORT\n', 'notipme': b'127.0.0.1\n'},
     demo_script('8BITMIME'), DEMO_TAKEN),
    ('A relay that wants a password: a line in authsenders.',
     {'authsenders': DEMO_ACCOUNT},
     demo_script('AUTH PLAIN LOGIN', DEMO_AUTH), DEMO_TAKEN),
    ('The same over TLS, which the server must have, with a certificate\n'
     'of the CA in control/tlshosts.',
     {'authsenders': DEMO_ACCOUNT,
      'tlshosts/127.0.0.1.pem': PEM['ca'].encode()},
     demo_script('STARTTLS', 'C: STARTTLS\nS: 220 go ahead\nTLS: relay',
                 'EHLOAUTH PLAIN LOGIN', DEMO_AUTH),
     DEMO_TAKEN + 'TLS, verified\n'),
    ('A recipient that the server does not know.',
     {'smtproutes': b'there.example:127.0.0.1:PORT\n'},
     demo_script('8BITMIME', end='S: 550 no such user here\nQ:'),
     'h127.0.0.1 does not like recipient.\nRemote host said: 550 no such '
     'user here\n\0DGiving up on 127.0.0.1.\n')]


def show(heading, lines):
    """Prints lines below their heading."""
    print('\n  %s' % heading)
    for line in lines:
        print('    %s' % line)


def control_lines(home):
    """What the control files hold, a line of theirs on each."""
    control = os.path.join(home.path, 'control')
    for folder, _, names in sorted(os.walk(control)):
        for name in sorted(names):
            path = os.path.join(folder, name)
            with open(path) as f:
                lines = f.read().splitlines()
            for line in lines if len(lines) < 5 else lines[:1] + ['...']:
                yield '%-15s %s' % (os.path.relpath(path, control), line)


def dialogue_lines(server):
    """The transcript, with the message in it and the password masked."""
    messages = iter(server.messages)
    for line in server.transcript:
        if line.startswith('D: '):
            message = next(messages).decode('utf-8', 'replace')
            for part in message.split('\r\n')[:-1] + ['.']:
                yield 'C: ' + part
        else:
            yield line.replace(DEMO_LOGIN, '***')


def report_lines(reports):
    """Each report with its letter explained, further lines of it below."""
    for report in reports:
        first, *rest = report.decode('utf-8', 'replace').splitlines()
        yield ('%s (%s)  %s' % (
            first[0], LETTERS[first[0]], first[1:])).rstrip()
        for line in rest:
            yield '    ' + line


def play(control, script, reports):
    """Runs and shows one scene; a list of what went otherwise than planned.
    """
    with FakeDNS(DEMO_RECORDS) as dns, FakeSMTP(script) as server, \
            Home(**{name: data.replace(b'PORT', b'%d' % server.port)
                    for name, data in control.items()}) as home:
        show('Command', [
            'QMAILHOME=%s DNSCACHEIP=%s \\' % (home.path, dns.dns),
            'python3 -IS qmail_remote.py %s \\' % DEMO_ARGS[0],
            '    %s %s <message' % tuple(DEMO_ARGS[1:])])
        show('Control files', control_lines(home))
        outcome = run_program(home, *DEMO_ARGS, message=DEMO_MESSAGE,
                              dns=dns.dns)
        server.close()
    show('DNS questions', ['%s %s' % query[:2] for query in dns.queries] or
         ['none'])
    show('Dialogue (S: server, C: qmail-remote)', dialogue_lines(server))
    show('Reports (each ends with a NUL)', report_lines(outcome.reports))
    show('What qmail-rspawn makes of it',
         ['%s: %s' % (outcome.verdict, VERDICTS[outcome.verdict])])
    # Which TLS it is depends on the Python at hand.
    output = re.sub(br'TLSv[0-9.]+, [A-Z0-9_-]+', b'TLS', outcome.output)
    wire = DEMO_MESSAGE.replace(b'\n', b'\r\n').replace(b'\n.', b'\n..')
    return ['%s: %r instead of %r' % (what, got, wanted)
            for what, got, wanted in [
                ('exit status', outcome.status, 0),
                ('standard error', outcome.stderr, b''),
                ('reports', output, reports.encode() + b'\0'),
                ('message', server.messages,
                 [wire] if reports.startswith('r') else []),
                ('server', server.error, None), ('DNS', dns.error, None),
                ('DNS asked', bool(dns.queries), 'notipme' in control)]
            if got != wanted]


def demo():
    """Plays all scenes; whether each went as planned."""
    start, good = time.monotonic(), True
    for number, (title, *scene) in enumerate(SCENES, 1):
        print('%s\n%d. %s' % ('-' * 72, number, title))
        wrong = play(*scene)
        if wrong:
            show('NOT AS PLANNED', wrong)
        good = good and not wrong
        print()
    print('%s\n%d deliveries in %.1f seconds, %s.' % (
        '-' * 72, len(SCENES), time.monotonic() - start,
        'all as planned' if good else 'NOT ALL AS PLANNED'))
    return good


# ------------------------------------------------------------ Bench
# `python3 test_qmail_remote.py bench`: the figures of README, section 10, and
# what cannot be less, in the same run.  Nothing here fails for being slow.
#
# PEER=/path/to/qmail-remote adds that program, run with $QMAILHOME set to
# the home of the bench.  One that has its home compiled in (the C program)
# cannot see that: then give BENCH_PORT=2600, and while the bench runs put
# data.example:127.0.0.1:2600 and far.example:127.0.0.1:2603 into that home's
# control/smtproutes.  INSTALLED=/path/to/qmail-remote is measured in place
# of one that `make install` makes for the bench.

HALF_TRIP = 0.025               # seconds that far.example is away, one way
LATE = 0.1                      # how late each DNS answer is
BENCH_LIMIT = 600               # the most seconds that a helper lives
CROWD = 110                     # connections to a server at once, at most

# Starts each command in turn, as often as argv[1] says, from a process so
# small that the peak memory of its children is their own.  One line for each
# run: which command, wall seconds, CPU seconds (of all its processes), peak
# memory in KiB, status.
METER = r"""
import os, sys, time
commands = eval(sys.argv[3])
for number in range(int(sys.argv[1]) * len(commands)):
    command = commands[number % len(commands)]
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(sys.argv[2], os.O_RDONLY), 0)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            os.execv(command[0], command)
        finally:
            os._exit(127)
    _, status, usage = os.wait4(child, 0)
    os.write(2, b'%d %f %f %d %d\n' % (
        number % len(commands), time.monotonic() - start,
        usage.ru_utime + usage.ru_stime, usage.ru_maxrss, status))
"""

# The least that can be done: the wire form, made before, by sendfile.
SENDFILE = """
import os, socket, sys
s = socket.create_connection(('127.0.0.1', int(sys.argv[1])))
for line in ('', 'EHLO me', 'MAIL FROM:<s@x>', 'RCPT TO:<r@x>', 'DATA'):
    s.sendall(line.encode() + b'\\r\\n' if line else b'')
    s.recv(9999)
at, size = 0, os.fstat(0).st_size
while at < size:
    at += os.sendfile(s.fileno(), 0, at, size - at)
s.sendall(b'.\\r\\n')
s.recv(9999)
os.write(1, b'K\\0')
"""

Run = collections.namedtuple('Run', 'wall cpu memory')
Place = collections.namedtuple('Place', 'port')


def forked(work, *args):
    """A child process that does nothing but work(*args); its id.  It ends
    with status 0, unless an exception ends it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(BENCH_LIMIT)
            work(*args)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def sink(listener, context=None):
    """An SMTP server that takes everything as fast as Python can: commands
    as they come, of a message no more than its end is looked at."""
    while True:
        sock = listener.accept()[0]
        with contextlib.suppress(OSError), sock:
            sock.settimeout(60)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(b'220 sink.example\r\n')
            sink_session(sock, context)


def sink_session(sock, context):
    """The commands of one connection, or of the TLS on it."""
    replies = {b'EHLO': b'250-sink.example\r\n250-PIPELINING\r\n'
               b'250-8BITMIME\r\n%s250 SIZE\r\n' % (
                   b'250-STARTTLS\r\n' if context else b''),
               b'DATA': b'354 go\r\n', b'STARTTLS': b'220 go\r\n'}
    block, data = bytearray(1 << 20), b''
    while True:
        more = sock.recv(65536)
        *lines, data = (data + more).split(b'\r\n')
        verbs = [line[:8].split(b' ')[0] for line in lines]
        if not more or b'QUIT' in verbs:
            return
        sock.sendall(b''.join(replies.get(verb, b'250 ok\r\n')
                              for verb in verbs))
        if b'STARTTLS' in verbs:
            with context.wrap_socket(sock, server_side=True) as tls:
                sink_session(tls, None)
            return
        if b'DATA' in verbs:
            tail = b'\r\n'
            while not tail.endswith(b'\r\n.\r\n'):
                count = sock.recv_into(block)
                if not count:
                    return
                tail = (tail + block[max(0, count - 5):count])[-5:]
            sock.sendall(b'250 ok\r\n')


def relay(listener, port):
    """Passes one connection after another on to a port of this host, and
    holds back what it passes, each way, and the connection itself: the
    client's last packet of the TCP handshake is on its way as long as any
    other.  The first two no program can hold back; the bench adds them."""
    while True:
        near = listener.accept()[0]
        start = time.monotonic()
        far = socket.create_connection(('127.0.0.1', port))
        other, waiting, readable = {near: far, far: near}, [], [near, far]
        for sock in other:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while readable or waiting:
            left = max(0, waiting[0][0] - time.monotonic()) \
                if waiting else 60
            for sock in select.select(readable, [], [], left)[0]:
                data = sock.recv(65536)
                # far greets when the handshake is over there, not sooner.
                due = max(time.monotonic(), start + HALF_TRIP)
                waiting.append((due + HALF_TRIP, other[sock], data))
                if not data:
                    readable.remove(sock)
            while waiting and waiting[0][0] <= time.monotonic():
                _, sock, data = waiting.pop(0)
                with contextlib.suppress(OSError):
                    if data:
                        sock.sendall(data)
                    else:
                        sock.shutdown(socket.SHUT_WR)
        near.close()
        far.close()


def keep_waiting(listener):
    """A server that says nothing."""
    held = []
    while True:
        held.append(listener.accept()[0])


@contextlib.contextmanager
def bench_servers():
    """The servers of the bench, a process for each connection at once:
    {name: port}."""
    base, ports, children = int(os.environ.get('BENCH_PORT', '0')), {}, []
    try:
        for name, count, serve, *args in (
                ('data', 1, sink), ('crowd', CROWD, sink),
                ('tls', 1, sink, tls_server('relay+ca')[0]),
                ('far', 1, relay, 'data'), ('farcrowd', CROWD, relay, 'crowd'),
                ('mute', 1, keep_waiting)):
            with socket.socket() as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(('127.0.0.1', base and base + len(ports)))
                listener.listen(128)
                ports[name] = listener.getsockname()[1]
                children += [forked(serve, listener, *[
                    ports.get(each, each) if serve is relay else each
                    for each in args]) for _ in range(count)]
        yield ports
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def family(pid):
    """A process and all its descendants; without /proc just itself."""
    found = [pid]
    for each in found:
        found += children_of(each)
    return found


def seconds_of(pids):
    """CPU seconds of processes and of their children that have ended, as
    Linux counts them."""
    total = 0
    for pid in pids:
        with open('/proc/%d/schedstat' % pid) as f:
            total += int(f.read().split()[0]) / 1e9
        with open('/proc/%d/stat' % pid, 'rb') as f:
            fields = f.read().rpartition(b')')[2].split()
        total += sum(map(int, fields[13:15])) / os.sysconf('SC_CLK_TCK')
    return total


class Bench:
    """The programs, and a method for each table."""

    def __init__(self, path, ports, home):
        self.path, self.ports, self.home = path, ports, home
        self.python = os.path.join(path, 'python3')
        os.symlink(os.path.realpath(sys.executable), self.python)
        self.env = {'PATH': path + ':/usr/local/bin:/usr/bin:/bin',
                    'QMAILHOME': home.path, 'DNSCACHEIP': '127.0.0.1:1'}
        self.copied = shutil.copy(PROGRAM, os.path.join(path, 'copied'))
        os.chmod(self.copied, 0o755)
        self.ours = os.environ.get('INSTALLED') or self.install()
        self.own = [('ours', self.ours)] + [
            ('PEER', os.environ.get('PEER'))] * bool(os.environ.get('PEER'))
        self.kilobyte = self.file('kilobyte', b'x' * 63 + b'\n', 1024)

    def install(self):
        """The program as `make install` leaves it, which takes root."""
        subprocess.check_call(
            ['make', '-s', '-C', HERE, 'install', 'DESTDIR=' + self.path,
             'PYTHON=' + self.python], env=self.env,
            stdout=subprocess.DEVNULL)
        return glob.glob(self.path + '/**/lib/**/qmail_remote.py',
                         recursive=True)[0]

    def file(self, name, block, size):
        """A message of about size bytes, made of whole blocks."""
        path = os.path.join(self.path, name)
        with open(path, 'wb') as f:
            f.write(block * (size // len(block)))
        return path

    def measure(self, commands, message, rounds):
        """A Run of medians for each command; None if it failed once, or did
        not say K."""
        done = subprocess.run(
            [self.python, '-IS', '-c', METER, str(rounds), message,
             repr(commands)], env=self.env, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            timeout=BENCH_LIMIT)
        runs = [[] for _ in commands]
        for line in done.stderr.splitlines():
            number, wall, cpu, memory, status = line.split()
            if status == b'0':
                runs[int(number)].append((float(wall), float(cpu),
                                          int(memory)))
        if b'Z' in re.findall(br'(?:^|\0)([ZD])', done.stdout):
            raise RuntimeError(done.stdout[:200])
        return [Run(*map(statistics.median, zip(*each)))
                if len(each) == rounds else None for each in runs]

    def runs(self, programs, place, message, rounds=5, count=1):
        """[(name, Run)] of programs, with so many recipients."""
        runs = self.measure([[program, place + '.example', 's@here.example'] +
                             ['r%d@there.example' % i for i in range(count)]
                             for _, program in programs], message, rounds)
        for (name, _), run in zip(programs, runs):
            if run is None:
                self.line(name, 'failed')
        return [(name, run) for (name, _), run in zip(programs, runs) if run]

    def table(self, title, *columns):
        print('\n%s' % title)
        self.line('', *columns)

    def line(self, name, *values):
        print('  %-22s' % name + ''.join(
            '%14s' % ('%.4g' % x if isinstance(x, float) else x)
            for x in values), flush=True)

    def small(self):
        self.table('1 KB to loopback', 'CPU ms', 'wall ms', 'a second', 'MB')
        bare, = self.measure([[self.python, '-IS', '-c', 'pass']],
                             self.kilobyte, 25)
        for name, run in [('python3 -IS -c pass', bare)] + self.runs(
                self.own + [('copied in', self.copied)], 'data',
                self.kilobyte, 25):
            self.line(name, run.cpu * 1e3, run.wall * 1e3, 1 / run.wall,
                      run.memory / 1024)

    def large(self):
        for title, block in (
                ('lines of text', b'The quick brown fox jumps over the lazy '
                 b'dog and has some more to say.\n'), ('dots', b'.\n')):
            self.table('100 MB to loopback, %s' % title, 'CPU ms', 'wall ms')
            message = self.file('large', block, 100 << 20)
            wire = self.file('wire', b'.' * block.startswith(b'.') +
                             block.replace(b'\n', b'\r\n'), 100 << 20)
            sent, = self.measure([[self.python, '-IS', '-c', SENDFILE, str(
                self.ports['data'])]], wire, 5)
            for name, run in [('sendfile', sent)] + self.runs(
                    self.own, 'data', message):
                self.line(name, run.cpu * 1e3, run.wall * 1e3)

    def trip(self):
        """Seconds of a round trip through the relay, its own work included:
        from the connection to the greeting, and for four commands."""
        found = []
        for _ in range(5):
            start = time.monotonic()
            with socket.create_connection(
                    ('127.0.0.1', self.ports['far']), 10) as sock:
                for _ in range(4):
                    sock.recv(9999)
                    sock.sendall(b'EHLO me.example\r\n')
                sock.recv(9999)
                found.append((time.monotonic() - start) / 5)
        return statistics.median(found)

    def far(self):
        self.table(
            '1 KB over a round trip of %d ms: round trips from SYN to the '
            'last reply (the wall\nless that without the distance, plus one '
            'for the TCP handshake)' % (2e3 * HALF_TRIP), 'recipients',
            'wall ms', 'round trips')
        trip = self.trip()
        for count in 1, 100:
            near = dict(self.runs(self.own, 'data', self.kilobyte, 5, count))
            for name, run in self.runs(self.own, 'far', self.kilobyte, 5,
                                       count):
                self.line(name, count, run.wall * 1e3,
                          (run.wall - near[name].wall) / trip + 1)

    def feed(self, place, together, messages, recipients, **control):
        """(seconds, CPU seconds) of so many messages to so many recipients
        each, with so many deliveries at once, through one spawner."""
        queue = [(b'0/%d' % (17 + number), b'r%d@there.example' % each)
                 for number in range(messages) for each in range(recipients)]
        queue.reverse()
        with QmailSend(Place(self.ports[place]), program=self.ours,
                       message=MESSAGE, **control) as qmail:
            for number in range(1, messages):
                os.link(os.path.join(qmail.mess, '17'),
                        os.path.join(qmail.mess, '%d' % (17 + number)))
            start, free, good = time.monotonic(), list(range(together)), 0
            while queue or len(free) < together:
                block = [(free.pop(), recipient, b's@x.example', messid)
                         for messid, recipient in
                         [queue.pop() for _ in range(min(len(queue),
                                                         len(free)))]]
                if block:
                    qmail.send(*block)
                for delnum, text in qmail.reports(1) + qmail.at_hand():
                    free.append(delnum)
                    good += text[:1] == b'K'
            wall = time.monotonic() - start
            cpu = seconds_of(family(qmail.child.pid))
            qmail.end()
        if good != messages * recipients:
            raise RuntimeError('%d delivered: %r' % (good, text))
        return wall, cpu

    def spawner(self):
        self.table('As qmail-rspawn, with a scripted qmail-send: 500 '
                   'messages', 'at once', 'a second', 'CPU ms each')
        for title, place in ('plain', 'data'), ('over TLS', 'tls'):
            for together in 20, 100:
                wall, cpu = map(statistics.median, zip(*[
                    self.feed(place, together, 500, 1) for _ in range(5)]))
                self.line(title, together, 500 / wall, 2 * cpu)
        self.table('One message, 500 recipients at one host, a round trip '
                   'of %d ms' % (2e3 * HALF_TRIP), 'at once', 'wall ms')
        for title, batch in ('a session for each', b'0'), ('batches', None):
            self.line(title, 100, 1e3 * self.feed(
                'farcrowd', 100, 1, 500, batch=batch)[0])
        with QmailSend(Place(self.ports['mute']), program=self.ours,
                       batch=b'0') as qmail:
            qmail.send(*[(number, b'r%d@there.example' % number)
                         for number in range(100)])
            end, pids = time.monotonic() + 10, []
            while time.monotonic() < end and len(pids) < 102:
                time.sleep(.5)
                pids, total = family(qmail.child.pid), 0
            for pid in pids:
                with open('/proc/%d/smaps_rollup' % pid) as f:
                    total += int(re.search(r'Pss:\s+(\d+)', f.read()).group(1))
            self.table('100 deliveries that wait for a server',
                       'processes', 'MB each')
            self.line('', len(pids), total / 1024 / 100)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)

    def late(self):
        self.table('DNS answers %d ms late; the wall less that of answers at '
                   'once' % (LATE * 1e3), 'wall ms', 'DNS answers')
        names = ['mx%d.many.example' % i for i in range(10)]
        records = {(name, 'A'): ['127.0.0.%d' % i]
                   for i, name in enumerate(names + ['relay.example'], 1)}
        records['many.example', 'MX'] = list(enumerate(names))
        for host, title in ('many', '10 exchangers'), ('one', 'a relay'):
            walls = []
            for what in {}, {'delay': LATE}:
                with FakeDNS(records, {
                        (name, '*'): what for name in names +
                        ['many.example', 'relay.example'] if what}) as dns:
                    self.env['DNSCACHEIP'] = dns.dns
                    walls += [run.wall for _, run in self.runs(
                        self.own[:1], host, self.kilobyte)]
            self.line(title, 1e3 * walls[1], (walls[1] - walls[0]) / LATE)


def machine():
    """What it was measured on."""
    with open('/proc/cpuinfo') as f:
        model = re.search(r'(?m)^model name\s*: (.*)$|\Z', f.read()).group(1)
    return '%s, %d cores, %s %s, %s %s' % (
        model, os.cpu_count() or 0, platform.python_implementation(),
        platform.python_version(), platform.system(), platform.release())


def bench():
    """Prints all tables."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix='bench-') as path, \
            bench_servers() as ports:
        os.chmod(path, 0o755)
        routes = ['%s.example:127.0.0.1:%d' % each for each in ports.items()]
        routes += ['many.example::%d' % ports['data'],
                   'one.example:relay.example:%d' % ports['data']]
        with Home(smtproutes='\n'.join(routes).encode(),
                  notipme=b'127.0.0.0/8', timeoutremote=b'60') as home:
            print(machine())
            it = Bench(path, ports, home)
            for table in (it.small, it.spawner, it.far, it.large, it.late):
                table()
    print('\n%.0f seconds.' % (time.monotonic() - start))
    return True


# ------------------------------------------------------------ All tests

# Those that take longest go first, so that none of them is left over.
LONGEST = ('Spawn', 'InQmail', 'Process', 'Matrix', 'Start', 'EximTest',
           'Fuzzing', 'Tls', 'Replies', 'Pipelining')


def check_some(names, numbers, folder):
    """The share of one process: the classes whose numbers, a byte each, it
    gets from a pipe.  For each it leaves a file in folder: how many tests
    it ran, which it skipped and why, and what went wrong."""
    atexit._clear()             # the parent's
    for number in iter(lambda: os.read(numbers, 1), b''):
        name, said = names[number[0]], io.StringIO()
        suite = unittest.defaultTestLoader.loadTestsFromName(
            name, sys.modules[__name__])
        ran = suite.countTestCases()    # testsRun of 3.12.1 lacks skipped ones
        skipped, good = [], False
        try:
            result = unittest.TextTestRunner(said, verbosity=0).run(suite)
            skipped, good = result.skipped, result.wasSuccessful()
        except BaseException:           # unittest lets KeyboardInterrupt pass
            traceback.print_exc(file=said)
        os.write(2, b'.' if good else b'F')
        with open(os.path.join(folder, name), 'w') as f:
            json.dump([ran, [[test.id(), why] for test, why in skipped],
                       '' if good else said.getvalue()], f)
    atexit._run_exitfuncs()     # our own; os._exit() would not


def no_loopback():
    """Why nobody can be talked to here, or nothing."""
    try:
        with socket.socket() as listener, socket.socket() as sock:
            listener.bind(('127.0.0.1', 0))
            listener.listen(1)
            sock.settimeout(5)
            sock.connect(listener.getsockname())
    except OSError as e:
        return '127.0.0.1: %s. Is the loopback interface up?' % e


class Loopback(unittest.TestCase):
    """make check without it"""

    def test_says_so(self):
        if os.getuid() or subprocess.call(
                ['unshare', '-n', 'true'], stderr=subprocess.DEVNULL):
            self.skipTest('takes root and a network namespace')
        done = subprocess.run(
            ['unshare', '-n', sys.executable, '-B', __file__, 'check'],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=30)
        self.assertEqual((1, b''), (done.returncode, done.stdout))
        self.assertIn(b'Is the loopback interface up?', done.stderr)


def check():
    """The command: all tests, in a process for each processor; whether all
    went well.  A class that nobody has finished has not."""
    start, folder = time.monotonic(), tempfile.mkdtemp(prefix='check-')
    names = [name for name, what in globals().items() if isinstance(
        what, type) and issubclass(what, unittest.TestCase) and
        unittest.defaultTestLoader.getTestCaseNames(what)]
    names.sort(key=lambda name: LONGEST.index(name)
               if name in LONGEST else len(LONGEST))
    numbers, queue = os.pipe()
    os.write(queue, bytes(range(len(names))))
    os.close(queue)
    children = [forked(lambda: check_some(names, numbers, folder))
                for _ in range(min(4, 1 + (os.cpu_count() or 1)))]
    for child in children:
        status = os.waitpid(child, 0)[1]
        if status:
            print('\nA process of tests ended: %#x' % status, file=sys.stderr)
    total, reasons, bad = 0, collections.defaultdict(list), []
    for name in names:
        try:
            with open(os.path.join(folder, name)) as f:
                ran, skipped, text = json.load(f)
        except OSError:
            ran, skipped, text = 0, [], 'not finished\n'
        total += ran
        for test, why in skipped:
            reasons[why].append(test.replace(__name__ + '.', ''))
        if text:
            bad.append(name)
            print('\n%s\n%s' % (name, text), file=sys.stderr)
    shutil.rmtree(folder)
    print(file=sys.stderr)
    for why, tests in sorted(reasons.items()):
        print('skipped, %s: %s' % (why, ', '.join(tests)), file=sys.stderr)
    print('%d tests in %.0f seconds, %d skipped: %s' % (
        total, time.monotonic() - start, sum(map(len, reasons.values())),
        'FAILED: ' + ' '.join(bad) if bad else 'OK'), file=sys.stderr)
    return bool(total) and not bad


# ------------------------------------------------------------ Coverage

# Runs inside a copy of the program, before its first statement: writes each
# step from line to line of that file, once, into a file that all processes
# share.  So nothing is lost when a process is killed or leaves by os._exit(),
# and no module is loaded.  As coverage.py does, a step into a function comes
# from minus its first line, a step out of it leads there.  What an exception
# ends is no step.
TRACER = """if True:
    import posix, sys
    seen = set()

    def step(first, last):
        if (first, last) not in seen:
            try:
                fd = posix.open(%(steps)r, posix.O_WRONLY | posix.O_APPEND)
                posix.write(fd, b'%%d %%d\\n' %% (first, last))
                posix.close(fd)
                seen.add((first, last))
            except OSError:             # no descriptor is left: a test
                pass

    def called(frame, event, arg):
        if '_coverage' not in frame.f_globals:
            return None
        code, line = frame.f_code, -frame.f_code.co_firstlineno
        if code.co_flags & 0x20 and frame.f_lineno != -line:
            line = frame.f_lineno       # a generator goes on

        def inside(frame, event, arg):
            nonlocal line
            if event == 'line':
                step(line, frame.f_lineno)
                line = frame.f_lineno
            elif event == 'return' and \\
                    code.co_code[frame.f_lasti] in %(returns)r:
                step(line, -code.co_firstlineno)
            return inside
        return inside
    module = sys._getframe(1)
    module.f_globals['_coverage'] = True
    module.f_trace = called(module, 'call', None)
    sys.settrace(called)
    if 'threading' in sys.modules:
        sys.modules['threading'].settrace(called)
"""


def coverage():
    """The command: check() in a copy of the project that notes the steps of
    the program in all processes; prints how many lines and branches that
    reaches, and which are missed.  Whether check() went well."""
    try:
        from coverage import Coverage, CoverageData
    except ImportError as e:
        sys.exit('make coverage needs coverage.py: %s' % e)
    folder = tempfile.mkdtemp(prefix='coverage-')
    os.chmod(folder, 0o755)             # some tests are not root
    steps = os.path.join(folder, 'steps')
    for name in 'Makefile', 'README', 'LICENSE', 'test_qmail_remote.py':
        shutil.copy(os.path.join(HERE, name), folder)
    with open(PROGRAM, encoding='utf-8') as f:
        source = f.read()
    traced = TRACER % {'steps': steps, 'returns': tuple(
        dis.opmap[name] for name in ('RETURN_VALUE', 'RETURN_CONST')
        if name in dis.opmap)}
    copy = os.path.join(folder, 'qmail_remote.py')
    with open(copy, 'w', encoding='utf-8') as f:
        f.write(source.replace(         # in a form that no grep counts
            '\n#\n# Copyright', '\n(exec)(bytes.fromhex(%r), {})\n# Copyright'
            % traced.encode().hex(), 1))
    shutil.copymode(PROGRAM, copy)
    try:
        with open(steps, 'w'):
            os.chmod(steps, 0o666)
        good = subprocess.call(
            [sys.executable, '-B', 'test_qmail_remote.py', 'check'],
            cwd=folder) == 0
        with open(steps) as f:
            arcs = {tuple(map(int, line.split())) for line in f}
        data = CoverageData(os.path.join(folder, 'data'))
        data.add_arcs({PROGRAM: arcs})
        data.write()
        report = Coverage(os.path.join(folder, 'data'), config_file=False)
        report.load()
        report.report([PROGRAM], show_missing=True)
        _, lines, _, missed, _ = report.analysis2(PROGRAM)
        branches = report.branch_stats(PROGRAM).values()
    finally:
        shutil.rmtree(folder)
    print('%.1f %% of %d lines, %.1f %% of %d branches' % (
        100 - 100 * len(missed) / len(lines), len(lines),
        100 * sum(taken for _, taken in branches)
        / sum(exits for exits, _ in branches),
        sum(exits for exits, _ in branches)))
    return good


if __name__ == '__main__':
    if sys.argv[1:] in (['demo'], ['bench'], ['fuzz'], ['check'],
                        ['coverage']):
        if sys.argv[1] != 'fuzz' and no_loopback():
            sys.exit(no_loopback())
        sys.exit(0 if globals()[sys.argv[1]]() else 1)
    unittest.main()
