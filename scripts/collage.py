"""Writes photographic collages: named cut-outs on photographs, in Flickr30k-Entities layout.

python scripts/collage.py --cutouts CUTOUTS --backgrounds PHOTOGRAPHS --out outputs/collage

A cut-out is a PNG with transparency and a .txt of the same name beside it, whose first line says what it shows. With
what Debian packages freely (apt-get download PACKAGE; dpkg-deb -x PACKAGE*.deb PACKAGE):

python scripts/collage.py --out outputs/collage \\
    --cutouts tuxpaint-stamps-default/usr/share/tuxpaint/stamps \\
    --backgrounds mate-backgrounds/usr/share/backgrounds/mate/nature \\
        plasma-workspace-wallpapers/usr/share/wallpapers/{BytheWater,ColdRipple,DarkestHour,EveningGlow} \\
        plasma-workspace-wallpapers/usr/share/wallpapers/{FallenLeaf,Grey,Kite,OneStandsOut,Path,summer_1am} \\
    --skip cartoon symbols flags easter 'grave-[b-i]' button confetti hard_candy 'party-*' stocking menorah \\
        YellowFlower FreshFlower Garden LadyBird TwoWings

The last ones are backgrounds that show what cut-outs are named after.
"""

import sys
from os.path import dirname, realpath

if not __package__:
    sys.path.insert(0, dirname(dirname(realpath(__file__))))
if __name__ == "__main__":
    from samer.runtime.early import heed_interrupts

    heed_interrupts()

import argparse
import time

from samer.runtime.commands import run


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cutouts", nargs="+", required=True, metavar="DIR", help="folders of cut-outs")
    parser.add_argument("--backgrounds", nargs="+", required=True, metavar="DIR", help="folders of photographs")
    parser.add_argument(
        "--skip",
        nargs="+",
        default=[],
        metavar="NAME",
        help="folders and files to leave out: names, or patterns such as 'grave-*'",
    )
    parser.add_argument("--out", required=True, help="folder to make; the same command goes on where it was ended")
    parser.add_argument("--train", type=int, default=800, help="scenes (800)")
    parser.add_argument("--val", type=int, default=60, help="scenes (60)")
    parser.add_argument("--test", type=int, default=400, help="scenes (400)")
    parser.add_argument("--size", type=int, default=448, help="of a scene's sides, in pixels (448)")
    parser.add_argument("--separate-cutouts", action="store_true", help="no kind of thing is in two splits")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    from samer.world.collage_write import Order, write_collages

    counts = {"train": options.train, "val": options.val, "test": options.test}
    order = Order(
        tuple(options.cutouts),
        tuple(options.backgrounds),
        counts,
        size=options.size,
        seed=options.seed,
        skip=tuple(options.skip),
        separate=options.separate_cutouts,
    )
    start = time.monotonic()
    fresh = write_collages(options.out, order)
    total = sum(counts.values())
    done = f"written to {options.out} in {time.monotonic() - start:.0f} s" if fresh else f"already in {options.out}"
    print(f"{total:,} scenes with {5 * total:,} captions {done}")


if __name__ == "__main__":
    run(main)
