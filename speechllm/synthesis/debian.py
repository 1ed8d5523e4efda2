"""flite, espeak-ng and WordNet from Debian archives: fetched and unpacked into the cache, nothing installed, no root.

The archives are those of Debian 12 (bookworm), pinned by version and SHA-256 like the quick start's speech, so a data
set made from them is the same everywhere. What the pins cost: they fit one distribution and one processor
architecture. When Debian 12 replaces a package (a security update of espeak-ng) or the machine runs another release,
`apt-get download` does not find the pinned version, and the error says so and what to do: install the engine with the
system's package manager, which is looked for first, or give a `--command` of your own.

The programs run from where they were unpacked, with `LD_LIBRARY_PATH` and `ESPEAK_DATA_PATH` into that folder. They are
linked to the sound card's libraries even to write a file. Most systems with a desktop have those; where espeak-ng does
not start without them, they are fetched too (`_SOUND_LIBRARIES`).
"""

import functools
import platform
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

from ..downloads import Archive, DownloadError, build_once, cache_directory, fetch


LIBRARIES = "usr/lib/x86_64-linux-gnu"
REMEDY = (
    "the pinned version is Debian 12's, which a later release or update does not offer; install flite or espeak-ng "
    "yourself (on Debian and Ubuntu: `apt-get install flite espeak-ng`), or name another engine with `--command`"
)


def _archives(licence: str, credit: str, *pins: tuple[str, str, float, str]) -> tuple[Archive, ...]:
    return tuple(
        Archive(name, version, sha256, "debian", licence, credit, megabytes, REMEDY)
        for name, version, megabytes, sha256 in pins
    )


FLITE = _archives(
    "BSD-3-Clause",
    "Flite, by Carnegie Mellon University and others; voices from the CMU Arctic databases",
    ("flite", "2.2-5", 0.3, "f4ce03470bf9974c2cb9cacd981e6be29339ef4c97cf994dd6fa3f90e6544db9"),
    ("libflite1", "2.2-5", 12.8, "bfa8c591f1b47730b30b372ec38e02918a1c9795eada67684e1746390ad2f061"),
) + _archives(
    "LGPL-2.1-or-later",
    "ALSA library, by the ALSA project",
    ("libasound2", "1.2.8-1+b1", 0.4, "44c77b076a7b11ae99712439022d822245b1994c435da564ebd320bb676faf4c"),
)
ESPEAK_NG = _archives(
    "GPL-3.0-or-later",
    "eSpeak NG, by Jonathan Duddington, Reece H. Dunn and others",
    ("espeak-ng", "1.51+dfsg-10+deb12u2", 0.4, "a11396a690f85f55e6e6b2965505237ddf3dc95c51936aa61de936f1ccf8f4d0"),
    ("libespeak-ng1", "1.51+dfsg-10+deb12u2", 0.2, "2b127a95b50d92cbd7a615968d2ac1566e1cbc87e27bcda0c2894afb2407c6d2"),
    ("espeak-ng-data", "1.51+dfsg-10+deb12u2", 4.3, "573f5661c6a5adcf949018baad158c4c773bf5579390ee5235a890f1cd694106"),
    ("libpcaudio0", "1.2-2", 0.01, "5309759e4d129c7d9a601240cc6e62820ecfa86a1a98e207992ffa6a572dbcd2"),
    ("libsonic0", "0.2.0-12", 0.01, "9d60de6918ace0b10e3e4e95421befd08aaf03b5b2a3d71ceb799e0cf259916f"),
)
# Everything that PulseAudio's library is linked to, except what every Debian system has.
_SOUND_LIBRARIES = _archives(
    "LGPL-2.1-or-later AND other free licences",
    "PulseAudio and the libraries it uses; see usr/share/doc in the unpacked folder",
    ("libasound2", "1.2.8-1+b1", 0.4, "44c77b076a7b11ae99712439022d822245b1994c435da564ebd320bb676faf4c"),
    ("libpulse0", "16.1+dfsg1-2+b1", 0.3, "7b2c5403cb726312219aad678becc6d6adcee1d8694fdffce0b6ec15ae010831"),
    ("libasyncns0", "0.8-6+b3", 0.01, "cadaff99f4178b1f580331045621b363abaaefc994e78eecba1857774a3cead2"),
    ("libdbus-1-3", "1.14.10-1~deb12u1", 0.2, "18ee0ce5fab9f7b671e87da1e9fa18660e36e04a3402f24bdb8635e0ba1d35f6"),
    ("libsndfile1", "1.2.0-1+deb12u1", 0.2, "02dc3f08fe8476e82e005f412e3b7289ff641180f33a9be8073f4bde61c85e8e"),
    ("libflac12", "1.4.2+ds-2", 0.2, "4d8431c274eef13ec9ee2c0bf988c34b4342367dec053b7f69a432525be5b1fe"),
    ("libogg0", "1.3.5-3", 0.02, "f67acb0477aed0354f411172e37af338f3ac6bd4f3766134a2cf5539884b5a28"),
    ("libopus0", "1.3.1-3", 0.2, "c172e212f9039e741916aa8e12f3670d1e049dc0c16685325641288c2d83faa7"),
    ("libvorbis0a", "1.3.7-1", 0.1, "01c14f9d1109650077a4c5c337c285476a6932d4d448f5a190c2b845724dbf21"),
    ("libvorbisenc2", "1.3.7-1", 0.1, "75dd4d6f904c7db82f5112e60d8efea9e81dfedf94e970c5da7af2b3d81643c0"),
    ("libmp3lame0", "3.100-6", 0.4, "b1292c749172e7623547ecf684da57d3ec6ca22109f08b11bbb9e6be6e6beb95"),
    ("libmpg123-0", "1.31.2-1+deb12u1", 0.2, "a10ad0d59995b859797a5f20d2833672051d0b2c7dab4c71f2e79258b2e3f631"),
    ("libx11-6", "2:1.8.4-2+deb12u2", 0.8, "d88c973e79fd9b65838d77624142952757e47a6eb1a58602acf0911cf35989f4"),
    ("libx11-xcb1", "2:1.8.4-2+deb12u2", 0.2, "f5da45e1d881a793250a96613f28c471a248877f1a0f18a5c90e2a620a76c898"),
    ("libxcb1", "1.15-1", 0.1, "fdc61332a3892168f3cc9cfa1fe9cf11a91dc3e0acacbc47cbc50ebaa234cc71"),
    ("libxau6", "1:1.0.9-1", 0.02, "679db1c4579ec7c61079adeaae8528adeb2e4bf5465baa6c56233b995d714750"),
    ("libxdmcp6", "1:1.1.2-3", 0.03, "ecb8536f5fb34543b55bb9dc5f5b14c9dbb4150a7bddb3f2287b7cab6e9d25ef"),
    ("libbsd0", "0.11.7-2", 0.1, "bb31cc8b40f962a85b2cec970f7f79cc704a1ae4bad24257a822055404b2c60b"),
)
WORDNET = replace(
    _archives(
        "LicenseRef-WordNet-3.0",
        "WordNet 3.0, Copyright 2006 by Princeton University",
        ("wordnet-base", "1:3.0-37", 6.5, "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752"),
    )[0],
    remedy="give texts of your own with `--data`",
)
ENGINES = {"flite": FLITE, "espeak-ng": ESPEAK_NG}


@functools.cache
def unpacked(engine: str) -> tuple[str, dict[str, str]]:
    """The program of "flite" or "espeak-ng" from Debian's archives, and the environment variables it needs.

    Fetched at the first call: 13 MB for flite, 5 to 9 MB for espeak-ng.

    Raises:
        DownloadError: the archives cannot be fetched, cannot be unpacked, or hold a program that does not start here.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise DownloadError(
            f"{engine} is not installed, and the archives pinned for it are Linux programs for x86_64, not for "
            f"{platform.system()} on {platform.machine()}. Remedy: {REMEDY}."
        )
    archives = ENGINES[engine]
    folder = cache_directory() / "engines" / engine
    provenance = {"archives": {str(archive): archive.sha256 for archive in archives}}
    build_once(folder, provenance, lambda partial: _unpack(engine, partial))
    return str(folder / "usr/bin" / engine), _environment(folder)


def _unpack(engine: str, folder: Path) -> None:
    """Unpack the archives of an engine into `folder`; with the sound libraries if it does not start without."""
    if shutil.which("dpkg-deb") is None:
        raise DownloadError(f"{engine}'s archives cannot be unpacked: there is no `dpkg-deb`. Remedy: {REMEDY}.")
    for archives in (ENGINES[engine], _SOUND_LIBRARIES):
        for archive in archives:
            subprocess.run(["dpkg-deb", "--extract", str(fetch(archive)), str(folder)], check=True)
        found = subprocess.run(
            [folder / "usr/bin" / engine, "--version"],
            env=_environment(folder),
            capture_output=True,
            text=True,
            errors="replace",
        )
        if "shared libraries" not in found.stderr:
            return
    raise DownloadError(
        f"{engine} from Debian's archives does not start here: {found.stderr.strip()}. Remedy: {REMEDY}."
    )


def _environment(folder: Path) -> dict[str, str]:
    libraries = folder / LIBRARIES
    return {"LD_LIBRARY_PATH": f"{libraries}:{libraries / 'pulseaudio'}", "ESPEAK_DATA_PATH": str(libraries)}
