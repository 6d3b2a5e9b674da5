"""What is true of a scene: metric truth (`Table`, read by the expert and the judge) and where it shows (`Facts`)."""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np

from insula.worlds.tabletop.scene import (
    BLOCK_HALF,
    BOWL_FLOOR,
    BOWL_HEIGHT,
    BOWL_RADIUS,
    BOWL_WALL,
    CAMERAS,
    DISTRACTOR_RADIUS,
)

AT_REST = 0.05  # meters per second
_FACE_ON_FACE = 0.006  # meters: a block that leans on another, or has tipped over, is further off


@dataclass(frozen=True)
class Block:
    """A block as it is, in the table's axes."""

    color: str
    position: np.ndarray  # [3] center, meters
    yaw: float  # radians, of the square's side nearest to the x axis: in [-pi/4, pi/4]
    speed: float  # meters per second
    half: float = BLOCK_HALF  # of a side, meters

    @property
    def top(self) -> float:
        """Height of its upper face, meters."""
        return float(self.position[2]) + self.half


@dataclass(frozen=True)
class Bowl:
    """A bowl. It never turns; in the task `moving` it drifts, else it stands where it is."""

    color: str
    position: np.ndarray  # [3] center of its floor, meters


@dataclass(frozen=True)
class Distractor:
    """A thing that is neither block nor bowl, and that nothing asks for."""

    shape: str  # "ball" or "cylinder"
    color: str
    position: np.ndarray  # [3] center, meters


@dataclass(frozen=True)
class Table:
    """The scene in meters. `held`: color of the block that both fingers touch, or None."""

    blocks: tuple[Block, ...]
    bowls: tuple[Bowl, ...]
    gripper: np.ndarray  # [3] the point between the fingertips
    yaw: float
    opening: float  # 0 closed .. 1 open
    held: str | None
    distractors: tuple[Distractor, ...] = ()

    def block(self, color: str) -> Block:
        """The block of that color; colors of blocks are all different. Raises StopIteration where there is none."""
        return next(b for b in self.blocks if b.color == color)

    def bowl(self, color: str) -> Bowl:
        """The bowl of that color, as `block`."""
        return next(b for b in self.bowls if b.color == color)

    def container(self, color: str) -> str | None:
        """Color of the bowl that the named block lies in (not held, center inside the wall, low enough), or None."""
        block = self.block(color)
        if color == self.held or block.position[2] > BOWL_FLOOR + 2 * block.half:  # lying on the floor it is half that
            return None

        for bowl in self.bowls:
            if np.hypot(*(block.position - bowl.position)[:2]) < BOWL_RADIUS:
                return bowl.color

        return None

    def support(self, color: str) -> str | None:
        """Color of the block that the named block rests on (neither held, face on face, center over it), or None."""
        block = self.block(color)
        if color == self.held or block.speed > AT_REST:  # one that falls past another does not lie on it
            return None

        for other in self.blocks:
            gap = block.position[2] - block.half - other.top
            near = np.hypot(*(block.position - other.position)[:2]) < other.half
            if other.color not in (color, self.held) and near and abs(gap) < _FACE_ON_FACE:
                return other.color

        return None


@dataclass(frozen=True)
class Pixel:
    """A thing in an image. `x`, `y`: its center, pixels from the top left corner (may lie outside the image);
    `in_frame`: the center lies inside; `visible`: share of nine sample points that the image shows.
    The gripper counts as visible wherever it is in the frame (it is never far behind anything)."""

    x: float
    y: float
    in_frame: bool
    visible: float


@dataclass(frozen=True)
class Facts:
    """`pixels[camera][name]`, names "{color} block", "{color} bowl", "{color} ball", "{color} cylinder", "gripper";
    images are `image_size` square."""

    table: Table
    pixels: dict[str, dict[str, Pixel]]
    image_size: int


def _cube(half: float) -> np.ndarray:
    signs = [(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]
    return np.array([(0, 0, 0), *signs]) * half


def _rim(radius: float, height: float) -> np.ndarray:
    turns = np.arange(8) * np.pi / 4
    circle = np.stack([radius * np.cos(turns), radius * np.sin(turns), np.full(8, height)], axis=1)
    return np.concatenate([np.zeros((1, 3)), circle])


_PER_BODY = 9


def _samples(name: str, table: Table) -> np.ndarray:
    """A center and eight points just inside the surface, [9, 3] meters in the body's own frame."""
    color, noun = name.split()
    if noun == "bowl":
        return _rim(BOWL_RADIUS + BOWL_WALL / 2, 0.9 * BOWL_HEIGHT)
    if noun == "block":
        return _cube(0.95 * table.block(color).half)

    # The corners of a cube inside: of a ball they lie at its radius, of a cylinder a little nearer to its axis.
    return _cube(0.95 * DISTRACTOR_RADIUS / np.sqrt(3))


def project(model: mujoco.MjModel, data: mujoco.MjData, camera: str, points: np.ndarray, size: int) -> np.ndarray:
    """World `points` [n, 3] in meters to pixels [n, 2] (x, y from the top left) of an image of `size` × `size`. NaN for
    points behind the camera."""
    index = model.camera(camera).id
    local = (points - data.cam_xpos[index]) @ data.cam_xmat[index].reshape(3, 3)

    # OpenGL's camera looks along −z with y up; an image's rows count downwards.
    focal = size / 2 / np.tan(np.radians(model.cam_fovy[index]) / 2)
    depth = np.where(local[:, 2] < -1e-6, -local[:, 2], np.nan)
    return np.stack([size / 2 + focal * local[:, 0] / depth, size / 2 - focal * local[:, 1] / depth], axis=1)


def _first_body(model: mujoco.MjModel, data: mujoco.MjData, camera: str, points: np.ndarray) -> np.ndarray:
    """The body that the ray from the camera through each of `points` [n, 3] meets first; -1 for none. int [n]."""
    eye = data.cam_xpos[model.camera(camera).id]
    rays = np.ascontiguousarray(points - eye).reshape(-1)
    geom, distance = np.empty(len(points), np.int32), np.empty(len(points))
    mujoco.mj_multiRay(model, data, eye, rays, None, True, -1, geom, distance, None, len(points), 1e3)
    return np.where(geom < 0, -1, model.geom_bodyid[geom])


def look(model: mujoco.MjModel, data: mujoco.MjData, table: Table, bodies: dict[str, int], size: int) -> Facts:
    """Project everything into every camera, images of `size` × `size` pixels. `bodies`: body index of each name of
    `Facts`, without the gripper."""
    names = list(bodies)
    clouds = [data.xpos[b] + _samples(name, table) @ data.xmat[b].reshape(3, 3).T for name, b in bodies.items()]
    points = np.concatenate(clouds)
    centers = np.stack([data.xpos[b] for b in bodies.values()] + [table.gripper])

    pixels: dict[str, dict[str, Pixel]] = {}
    for camera in CAMERAS:
        where = project(model, data, camera, centers, size)
        inside = np.all((where >= 0) & (where < size), axis=1)  # NaN, behind the camera, compares as outside

        # By rays rather than by drawing each body in a color of its own: no second image, and no OpenGL.
        spots = project(model, data, camera, points, size)
        itself = _first_body(model, data, camera, points) == np.repeat(list(bodies.values()), _PER_BODY)
        seen = itself & np.all((spots >= 0) & (spots < size), axis=1)
        share = [*seen.reshape(-1, _PER_BODY).mean(axis=1), 1.0 if inside[-1] else 0.0]

        pixels[camera] = {
            name: Pixel(float(xy[0]), float(xy[1]), bool(i), float(v))
            for name, xy, i, v in zip([*names, "gripper"], where, inside, share, strict=True)
        }

    return Facts(table, pixels, size)
