"""What stands on the table: the MuJoCo model (compiled once for a task) and the random layouts poured into it.

Meters and radians. x grows to the right of the `front` image, y away from that camera, z up; the table top is z = 0.
The gripper's position is the point between its fingertips.

             y  +0.13 ┌──────────────────────────┐
                      │   ▪        ( bowl )      │       ▪ 3 blocks, 4 cm
                      │       ▪              ▪   │       2 bowls (3 to sort into), 12 cm inside
                -0.13 └──────────────────────────┘
                   x -0.18        ▲          +0.18
                              front camera
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from insula.worlds.tabletop.instructions import COLORS

BLOCKS, BOWLS = 3, 2
BLOCK_HALF = 0.02  # half of a side
BOWL_RADIUS = 0.06  # inner
BOWL_WALL, BOWL_HEIGHT, BOWL_FLOOR, BOWL_SIDES = 0.005, 0.022, 0.002, 12
DISTRACTOR_RADIUS = 0.014  # of balls and cylinders, and half of a cylinder's height
FINGER_TRAVEL = 0.045  # each; the opening between the fingers is twice that
FINGER_HALF = (0.005, 0.010, 0.040)
FINGER_BELOW = 0.014  # the fingers' ends below the point between the fingertips
HELD_TRAVEL = BLOCK_HALF - 0.0003  # a finger pressing a block

BLOCK_AREA = (0.18, 0.13)  # |x|, |y| of block centers
BOWL_AREA = (0.135, 0.085)  # of bowl centers
BLOCK_DISTANCE = 0.085  # of two blocks' centers: the open fingers fit between them
BLOCK_TO_BOWL = BOWL_RADIUS + BOWL_WALL + 0.032
BOWL_TO_BOWL = 2 * (BOWL_RADIUS + BOWL_WALL) + 0.01
GRIPPER_LOW = np.array([-0.20, -0.15, 0.02])
GRIPPER_HIGH = np.array([0.20, 0.15, 0.18])
YAW_LIMIT = 1.2  # of the wrist, either way
BLOCK_YAW = 0.5  # at most, at the start: the expert squares all of them up without turning its wrist (docs/log.md)
CAMERAS = ("front", "wrist")

RGBA = {
    "red": (0.86, 0.06, 0.08, 1.0),
    "green": (0.05, 0.62, 0.12, 1.0),
    "blue": (0.08, 0.22, 0.95, 1.0),
    "yellow": (0.98, 0.90, 0.05, 1.0),
    "purple": (0.55, 0.10, 0.75, 1.0),
    "orange": (1.00, 0.50, 0.00, 1.0),
}
assert tuple(RGBA) == COLORS


@dataclass(frozen=True)
class Path:
    """A bowl's way to and fro between two `ends` [2, (x, y)] at `speed` meters per second. `start`: where on it at time
    0, in lengths of the way: below 1 on the way there, below 2 on the way back."""

    ends: np.ndarray
    speed: float
    start: float

    def at(self, seconds: float) -> np.ndarray:
        """(x, y) at that time, meters."""
        length = float(np.hypot(*(self.ends[1] - self.ends[0])))
        gone = (self.start + self.speed * seconds / length) % 2
        return self.ends[0] + min(gone, 2 - gone) * (self.ends[1] - self.ends[0])


@dataclass(frozen=True)
class SceneLayout:
    """One arrangement. `block_poses` [3, (x, y, z, yaw)], `bowl_xy` [bowls, 2], `gripper` (x, y, z, yaw); `travel` of
    a finger: 0 closed to FINGER_TRAVEL open. `paths`: of every bowl, or empty where they stand still."""

    block_colors: tuple[str, ...]
    block_poses: np.ndarray
    bowl_colors: tuple[str, ...]
    bowl_xy: np.ndarray
    gripper: np.ndarray
    travel: float
    block_halves: tuple[float, ...] = (BLOCK_HALF,) * BLOCKS
    distractor_colors: tuple[str, ...] = ()
    distractor_xy: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))
    paths: tuple[Path, ...] = ()


# --- the model ------------------------------------------------------------------------------------------------------


def _bowl(index: int) -> str:
    radius, half = BOWL_RADIUS + BOWL_WALL / 2, BOWL_HEIGHT / 2
    side = radius * math.tan(math.pi / BOWL_SIDES) + BOWL_WALL / 2
    walls = "".join(
        f'<geom class="bowl" type="box" size="{BOWL_WALL / 2} {side} {half}" '
        f'pos="{radius * math.cos(a)} {radius * math.sin(a)} {half}" euler="0 0 {a}"/>'
        for a in (2 * math.pi * k / BOWL_SIDES for k in range(BOWL_SIDES))
    )
    floor = f'<geom class="bowl" type="cylinder" size="{radius} {BOWL_FLOOR / 2}" pos="0 0 {BOWL_FLOOR / 2}"/>'
    return f'<body name="bowl{index}" mocap="true">{floor}{walls}</body>'


def _block(index: int) -> str:
    size = f"{BLOCK_HALF} {BLOCK_HALF} {BLOCK_HALF}"
    return (
        f'<body name="block{index}" pos="{0.1 * index} 0 {BLOCK_HALF}"><freejoint/>'
        f'<geom name="block{index}" class="block" type="box" size="{size}"/></body>'
    )


def _finger(name: str, sign: int) -> str:
    x, y, z = FINGER_HALF
    return (
        f'<body name="{name}" gravcomp="1">'
        f'<joint name="{name}" class="finger" axis="{sign} 0 0" range="0 {FINGER_TRAVEL}"/>'
        f'<geom name="{name}" class="finger" size="{x} {y} {z}" pos="{sign * x} 0 {z - FINGER_BELOW}"/></body>'
    )


def _distractor(index: int, shape: str) -> str:
    kind = {"ball": "sphere", "cylinder": "cylinder"}[shape]
    geom = f'<geom class="bowl" type="{kind}" size="{DISTRACTOR_RADIUS} {DISTRACTOR_RADIUS}"/>'
    return f'<body name="distractor{index}" mocap="true">{geom}</body>'


def mjcf(offscreen: int, bowls: int = BOWLS, distractors: tuple[str, ...] = ()) -> str:
    """The model as MJCF, from primitives only. `offscreen`: side of the largest image, pixels; `distractors`: their
    shapes.

    Collision bits: blocks meet everything; fingers meet blocks only (not bowls, table or each other), so a gripper
    low in a bowl cannot jam. Bowls and distractors are mocap bodies: moved by a layout, immovable in physics.
    """
    lo, hi = GRIPPER_LOW, GRIPPER_HIGH
    slides = "".join(
        f'<joint name="{n}" type="slide" axis="{a}" range="{lo[i]} {hi[i]}" armature="0.2"/>'
        for i, (n, a) in enumerate((("x", "1 0 0"), ("y", "0 1 0"), ("z", "0 0 1")))
    )
    motors = "".join(f'<position joint="{n}" kp="12000" dampratio="1"/>' for n in "xyz")
    fingers = "".join(f'<position joint="{n}" kp="300" dampratio="1" forcerange="-5 5"/>' for n in ("left", "right"))
    firm = (
        'solref="0.01 1" solimp="0.97 0.995 0.001"'  # fingers press 5 N: the default contact gives way by millimeters
    )
    return f"""
<mujoco model="insula tabletop">
  <compiler angle="radian"/>
  <option timestep="0.005" integrator="implicitfast" cone="elliptic" iterations="50" ls_iterations="30"/>
  <statistic extent="1" center="0 0 0"/>
  <visual>
    <global offwidth="{offscreen}" offheight="{offscreen}"/>
    <headlight ambient="0.62 0.62 0.62" diffuse="0 0 0" specular="0 0 0"/>
    <map znear="0.01" zfar="10"/>
  </visual>
  <default>
    <default class="block">
      <geom mass="0.08" friction="1 0.01 0.0005" condim="4" contype="3" conaffinity="3" {firm}/>
    </default>
    <default class="finger">
      <joint type="slide" damping="2" armature="0.1"/>
      <geom type="box" mass="0.05" friction="1.5 0.02 0.0005" condim="4" contype="2" conaffinity="0" {firm}
            rgba=".1 .1 .1 1"/>
    </default>
    <default class="palm"><geom type="box" contype="0" conaffinity="0" rgba=".35 .35 .35 1"/></default>
    <default class="bowl"><geom contype="1" conaffinity="0" friction="0.6 0.005 0.0001"/></default>
  </default>
  <worldbody>
    <light directional="true" pos="0 0 2" dir="0.15 0.35 -1" diffuse=".38 .38 .38" specular="0 0 0" castshadow="false"/>
    <camera name="front" pos="0 -0.45 0.48" xyaxes="1 0 0 0 0.660 0.752" fovy="43"/>
    <geom name="table" type="box" size="2 2 0.05" pos="0 0 -0.05" rgba=".74 .74 .74 1" contype="1" conaffinity="0"/>
    <body name="gripper" gravcomp="1">
      {slides}
      <joint name="yaw" type="hinge" axis="0 0 1" range="-{YAW_LIMIT} {YAW_LIMIT}" armature="0.002"/>
      <geom size="0.052 0.012 0.008" pos="0 0 0.074" class="palm" mass="0.3"/>
      <geom size="0.012 0.012 0.015" pos="0 0 0.095" class="palm" mass="0.2"/>
      <camera name="wrist" pos="0 -0.045 0.068" xyaxes="1 0 0 0 0.93 0.37" fovy="92"/>
      {_finger("left", -1)}{_finger("right", 1)}
    </body>
    {"".join(_bowl(i) for i in range(bowls))}
    {"".join(_block(i) for i in range(BLOCKS))}{"".join(_distractor(i, shape) for i, shape in enumerate(distractors))}
  </worldbody>
  <actuator>{motors}<position joint="yaw" kp="60" dampratio="1"/>{fingers}</actuator>
</mujoco>"""


# --- layouts --------------------------------------------------------------------------------------------------------


def far_from(points: np.ndarray, point: np.ndarray, distance: float) -> bool:
    """Whether all `points` [n, 2] lie at least `distance` from `point` [2]."""
    return len(points) == 0 or bool(np.min(np.hypot(*(points - point).T)) >= distance)


def place_blocks(
    rng: np.random.Generator, bowls: np.ndarray, apart: float = BLOCK_DISTANCE, tries: int = 60
) -> np.ndarray | None:
    """Centers of three blocks [3, 2] at least `apart` from each other, and outside all `bowls` [n, 2] with room for the
    fingers around; None where `tries` draws did not find them."""
    blocks = np.zeros((0, 2))
    for _ in range(tries):
        point = rng.uniform(-1, 1, 2) * BLOCK_AREA
        if far_from(bowls, point, BLOCK_TO_BOWL) and far_from(blocks, point, apart):
            blocks = np.concatenate([blocks, point[None]])
        if len(blocks) == BLOCKS:
            return blocks

    return None


def _positions(rng: np.random.Generator, apart: float) -> tuple[np.ndarray, np.ndarray]:
    """Non-overlapping bowls [2, 2] and blocks [3, 2], with room for the fingers around every block.

    Drawn again until they fit. Every number drawn here is part of what a seed means: another order of drawing, or
    another distance, and the seeds of demonstrations, evaluation and pretraining are other scenes.
    """
    while True:
        bowls = rng.uniform(-1, 1, (BOWLS, 2)) * BOWL_AREA
        if not far_from(bowls[:1], bowls[1], BOWL_TO_BOWL):
            continue

        # Bowls may lie so that three blocks do not fit beside them; then both are drawn again.
        blocks = place_blocks(rng, bowls, apart)
        if blocks is not None:
            return bowls, blocks


def draw_colors(rng: np.random.Generator, count: int) -> tuple[str, ...]:
    """This many of `COLORS`, all different."""
    return tuple(COLORS[i] for i in rng.permutation(len(COLORS))[:count])


def draw_layout(rng: np.random.Generator, apart: float = BLOCK_DISTANCE) -> SceneLayout:
    """The start of an episode: blocks on the table, the gripper open and above the middle."""
    return arrange(rng, *_positions(rng, apart))


def arrange(rng: np.random.Generator, bowls: np.ndarray, blocks: np.ndarray) -> SceneLayout:
    """Colors, the blocks' angles and the gripper's pose for `bowls` [n, 2] and `blocks` [3, 2] in their places."""
    yaw = rng.uniform(-BLOCK_YAW, BLOCK_YAW, (BLOCKS, 1))
    block_colors, bowl_colors = draw_colors(rng, BLOCKS), draw_colors(rng, len(bowls))
    gripper = np.array([*rng.uniform([-0.06, -0.05, 0.11], [0.06, 0.05, 0.15]), 0.0])

    return SceneLayout(
        block_colors=block_colors,
        block_poses=np.concatenate([blocks, np.full((BLOCKS, 1), BLOCK_HALF), yaw], axis=1),
        bowl_colors=bowl_colors,
        bowl_xy=bowls,
        gripper=gripper,
        travel=FINGER_TRAVEL,
    )


def draw_pair(rng: np.random.Generator, layout: SceneLayout) -> tuple[str, str]:
    """A block's color and a bowl's color in this scene."""
    return layout.block_colors[rng.integers(BLOCKS)], layout.bowl_colors[rng.integers(len(layout.bowl_colors))]


def draw_anything(rng: np.random.Generator) -> tuple[SceneLayout, tuple[str, str]]:
    """A scene out of nowhere: any gripper pose; a quarter holds a block, a quarter has a block in a bowl. And a pair of
    colors to ask for."""
    start = draw_layout(rng)
    pair = draw_pair(rng, start)
    poses = start.block_poses.copy()

    # order[0] may lie in a bowl, order[1] be held: never the same block.
    order = rng.permutation(BLOCKS)
    if rng.random() < 0.25:
        angle, radius = rng.uniform(0, 2 * math.pi), 0.028 * math.sqrt(rng.random())  # evenly over a disk
        center = start.bowl_xy[rng.integers(BOWLS)] + radius * np.array([math.cos(angle), math.sin(angle)])
        poses[order[0]] = [*center, BLOCK_HALF + BOWL_FLOOR, rng.uniform(-0.7, 0.7)]

    holding = rng.random() < 0.25
    others = np.delete(poses, order[1], axis=0) if holding else poses
    gripper = _free_gripper(rng, others)
    if holding:
        poses[order[1]] = [*gripper[:2], max(gripper[2] + rng.uniform(-0.004, 0.004), BLOCK_HALF), gripper[3]]

    # Mostly open, as it is in an episode while it holds nothing.
    travel = HELD_TRAVEL if holding else FINGER_TRAVEL * (1.0 if rng.random() < 0.6 else rng.random())
    return replace(start, block_poses=poses, gripper=gripper, travel=float(travel)), pair


def _free_gripper(rng: np.random.Generator, blocks: np.ndarray) -> np.ndarray:
    """A random gripper pose (x, y, z, yaw) that does not stand inside a block; half of them near one."""
    while True:
        xyz = rng.uniform(GRIPPER_LOW, GRIPPER_HIGH)

        # An episode spends its time near blocks; poses drawn evenly are seldom there.
        if rng.random() < 0.5:
            xyz[:2] = np.clip(
                blocks[rng.integers(len(blocks)), :2] + rng.normal(0, 0.03, 2), GRIPPER_LOW[:2], GRIPPER_HIGH[:2]
            )

        if xyz[2] > 3 * BLOCK_HALF or far_from(blocks[:, :2], xyz[:2], 0.075):
            return np.array([*xyz, rng.normal(0, 0.03)])
