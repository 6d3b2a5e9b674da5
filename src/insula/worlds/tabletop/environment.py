"""A table with three blocks and two bowls; only the instruction tells which block goes where.

    env = gymnasium.make("insula/Tabletop-v0", image_size=64)
    observation, info = env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step(action)

Observation: images.front, images.wrist uint8 [64, 64, 3]; state float32 [5] = gripper x, y, z (meters), yaw (radians),
opening (0 closed to 1 open); task, the instruction. Action float32 [7] in [-1, 1] at 10 Hz: dx, dy, dz (x `MAX_STEP`
meters), droll, dpitch (accepted and ignored: the wrist has no such joint), dyaw (x `MAX_TURN` radians), gripper
(> 0 closes, else opens). Moves are relative to the measured pose and come to rest within the step, so nothing hidden is
carried from one step to the next.

Blocks are grasped by friction alone. Fingers meet blocks only (they pass through bowls and table); bowls do not move.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium import spaces

from insula.errors import InputError
from insula.worlds.tabletop.facts import Block, Bowl, Facts, Table, look
from insula.worlds.tabletop.instructions import check_color, instruction
from insula.worlds.tabletop.rendering import Renderer
from insula.worlds.tabletop.scene import (
    BLOCKS,
    BOWLS,
    CAMERAS,
    FINGER_TRAVEL,
    GRIPPER_HIGH,
    GRIPPER_LOW,
    RGBA,
    YAW_LIMIT,
    SceneLayout,
    draw_anything,
    draw_layout,
    mjcf,
)

MAX_STEP = 0.02  # meters per control step and axis
MAX_TURN = 0.3  # radians per control step
CONTROL_HZ = 10
ACTION_DIM, STATE_DIM = 7, 5
ACTION_NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
STATE_NAMES = ("x", "y", "z", "yaw", "opening")
_CHUNKS, _SUBSTEPS = 10, 2  # x 5 ms = 0.1 s: targets of the motors in a control step, physics steps for each
_FINGER_STEP = 0.025  # meters a finger may travel in one control step: faster, and it would hit the block like a hammer
# From 0 to 1 with no speed at either end, done after 80 % of a step: the rest is for coming to rest.
_RAMP = np.array([3 * t**2 - 2 * t**3 for t in np.minimum(np.arange(1, _CHUNKS + 1) / (0.8 * _CHUNKS), 1)])
_AT_REST = 0.05  # meters per second


class TabletopEnv(gymnasium.Env):
    """See the module's docstring. Reward 1 and termination at success; `info` tells `success`, `wrong_object`, `held`.

    success: the named block lies at rest in the named bowl and the gripper is open. wrong_object (remembered until the
    next reset): another block came to lie in any bowl, or the named block in the other bowl, with the gripper off it.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}  # noqa: RUF012 (Gymnasium's own convention)

    def __init__(self, image_size: int = 64, render_mode: str | None = None) -> None:
        if not isinstance(image_size, int) or not 16 <= image_size <= 1024:
            raise InputError(f"image_size: got {image_size!r}, expected an integer from 16 to 1024 (64 is usual)")
        if render_mode not in (None, "rgb_array"):
            raise InputError(f"render_mode: got {render_mode!r}, expected None or 'rgb_array'")

        self.image_size = image_size
        self.render_mode = render_mode

        # A little wider than the joints' limits, which MuJoCo keeps by a spring: they may give way by millimeters.
        image = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        low = np.array([*(GRIPPER_LOW - 0.02), -YAW_LIMIT - 0.1, 0], np.float32)
        high = np.array([*(GRIPPER_HIGH + 0.02), YAW_LIMIT + 0.1, 1], np.float32)
        self.observation_space = spaces.Dict(
            {
                "images": spaces.Dict({name: image for name in CAMERAS}),
                "state": spaces.Box(low, high, dtype=np.float32),
                "task": spaces.Text(64, charset="abcdefghijklmnopqrstuvwxyz "),
            }
        )
        self.action_space = spaces.Box(-1, 1, (ACTION_DIM,), np.float32)

        # Compiled once. Scenes differ in poses and colors alone, so the renderer's context, made of the model, stays.
        self.model = mujoco.MjModel.from_xml_string(mjcf(image_size))
        self.data = mujoco.MjData(self.model)
        self._blocks = [self.model.body(f"block{i}").id for i in range(BLOCKS)]
        self._bowls = [self.model.body(f"bowl{i}").id for i in range(BOWLS)]
        self._fingers = [self.model.geom(name).id for name in ("left", "right")]
        self._block_geoms = [self.model.geom(f"block{i}").id for i in range(BLOCKS)]

        self._renderer: Renderer | None = None  # with the first image: physics alone needs no OpenGL
        self._layout: SceneLayout | None = None
        self._wrong = False

    # --- Gymnasium ---------------------------------------------------------------------------------------------------

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """A new scene, the same for the same seed. Options: `swap` (bool) asks for another block and the other bowl of
        that same scene; `task` names (block color, bowl color). Raises InputError for colors not in the scene and for
        other options."""
        super().reset(seed=seed)
        options = dict(options or {})

        # The scene is drawn before options are looked at: they must not change what a seed means.
        layout = draw_layout(self.np_random)
        task = _choose_task(layout, swap=bool(options.pop("swap", False)), task=options.pop("task", None))
        if options:
            raise InputError(f"reset options: got {sorted(options)}, expected only 'swap' and 'task'")

        self._pour(layout, task)
        return self._observe(), self._info(self.table())

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """One tenth of a second. Raises InputError for an action of the wrong shape or with NaN or infinity,
        RuntimeError before the first reset."""
        if self._layout is None:
            raise RuntimeError("step() before reset(): the table is empty")

        self._move(check_action(action))
        table = self.table()
        self._wrong = self._wrong or _misplaced(table, self.task)  # remembered, though it may yet be put right

        info = self._info(table)
        return self._observe(), float(info["success"]), bool(info["success"]), False, info

    def render(self) -> np.ndarray:
        """The `front` image, uint8 [image_size, image_size, 3]. Raises GLError where nothing can draw."""
        return self._draw(("front",))["front"]

    def close(self) -> None:
        """Free the renderer; a second call does nothing."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    # --- truth and teleporting ---------------------------------------------------------------------------------------

    def randomize(self, rng: np.random.Generator) -> dict:
        """Teleport to a random scene (any gripper pose; sometimes holding, sometimes a block in a bowl) and observe it.

        No physics is stepped: for images with known facts, not for episodes.
        """
        layout = draw_anything(rng)
        self._pour(layout, layout.task)
        return self._observe()

    @property
    def task(self) -> tuple[str, str]:
        """(block color, bowl color) asked for. Raises RuntimeError before the first reset."""
        if self._layout is None:
            raise RuntimeError("no task before reset(): the table is empty")
        return self._task

    def table(self) -> Table:
        """The truth in meters, fast (no projection). Raises RuntimeError before the first reset."""
        layout, data = self._layout, self.data
        if layout is None:
            raise RuntimeError("table() before reset(): the table is empty")

        # qvel: four joints of the gripper and two fingers, then six of each block, of which three are linear.
        quats, speeds = data.xquat[self._blocks], data.qvel[6:].reshape(BLOCKS, 6)
        blocks = tuple(
            Block(color, data.xpos[b].copy(), _square_yaw(q), float(np.linalg.norm(v[:3])))
            for color, b, q, v in zip(layout.block_colors, self._blocks, quats, speeds, strict=True)
        )
        bowls = tuple(Bowl(c, data.xpos[b].copy()) for c, b in zip(layout.bowl_colors, self._bowls, strict=True))

        # Copies: `data` is MuJoCo's own memory, and the next step writes over it.
        held = self._held(layout)
        return Table(blocks, bowls, data.qpos[:3].copy(), float(data.qpos[3]), self._opening(), held)

    def facts(self) -> Facts:
        """The truth in meters and in the pixels of every camera. Raises RuntimeError before the first reset."""
        table = self.table()
        names = [f"{b.color} block" for b in table.blocks] + [f"{b.color} bowl" for b in table.bowls]
        bodies = dict(zip(names, [*self._blocks, *self._bowls], strict=True))
        return look(self.model, self.data, table, bodies, self.image_size)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _pour(self, layout: SceneLayout, task: tuple[str, str]) -> None:
        """Put a layout on the table: poses into the data, colors into the model."""
        mujoco.mj_resetData(self.model, self.data)
        self._layout = layout
        self._task = task
        self._wrong = False

        # qpos: x, y, z, yaw of the gripper, two fingers, then position and quaternion (w first) of each block.
        qpos = self.data.qpos
        qpos[:4], qpos[4:6] = layout.gripper, layout.travel
        for i, (x, y, z, yaw) in enumerate(layout.block_poses):
            qpos[6 + 7 * i : 13 + 7 * i] = [x, y, z, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
        self.data.mocap_pos[:, :2], self.data.mocap_pos[:, 2] = layout.bowl_xy, 0

        colors = [*layout.block_colors, *layout.bowl_colors]
        for body, color in zip([*self._blocks, *self._bowls], colors, strict=True):
            self.model.geom_rgba[self.model.geom_bodyid == body] = RGBA[color]

        # Motors hold the pose they start in, instead of pulling back to zero at the first step.
        self.data.ctrl[:4], self.data.ctrl[4:] = layout.gripper, layout.travel
        mujoco.mj_forward(self.model, self.data)  # poses of bodies and cameras, which setting qpos leaves as they were

    def _move(self, action: np.ndarray) -> None:
        """Glide to the measured pose plus the action's offset; the smooth ramp ends before the step does."""
        scale = np.array([MAX_STEP, MAX_STEP, MAX_STEP, MAX_TURN])
        start, fingers = self.data.qpos[:4].copy(), self.data.qpos[4:6].copy()
        start[3] = self.data.ctrl[3]  # the wrist holds its angle: fingers closing on a turned block would creep
        goal = start + scale * action[[0, 1, 2, 5]]  # without roll and pitch
        goal = np.clip(goal, [*GRIPPER_LOW, -YAW_LIMIT], [*GRIPPER_HIGH, YAW_LIMIT])
        travel = -_FINGER_STEP if action[6] > 0 else _FINGER_STEP

        for chunk, fraction in enumerate(_RAMP, start=1):
            self.data.ctrl[:4] = start + fraction * (goal - start)
            self.data.ctrl[4:] = np.clip(fingers + travel * chunk / _CHUNKS, 0, FINGER_TRAVEL)
            mujoco.mj_step(self.model, self.data, _SUBSTEPS)
        mujoco.mj_forward(self.model, self.data)  # poses and contacts of this very state, for camera and judge

    def _opening(self) -> float:
        return float(np.clip(self.data.qpos[4:6].mean() / FINGER_TRAVEL, 0, 1))

    def _held(self, layout: SceneLayout) -> str | None:
        """The block that both fingers touch."""
        pairs = {tuple(sorted(pair)) for pair in self.data.contact.geom.tolist()}  # MuJoCo's order is its own

        for color, geom in zip(layout.block_colors, self._block_geoms, strict=True):
            if all(tuple(sorted((geom, finger))) in pairs for finger in self._fingers):
                return color

        return None

    def _info(self, table: Table) -> dict[str, Any]:
        return {"success": _achieved(table, self.task), "wrong_object": self._wrong, "held": table.held}

    def _draw(self, cameras: tuple[str, ...]) -> dict[str, np.ndarray]:
        if self._renderer is None:
            self._renderer = Renderer(self.model, self.image_size)
        return self._renderer.draw(self.data, cameras)

    def _observe(self) -> dict[str, Any]:
        state = np.array([*self.data.qpos[:4], self._opening()], np.float32)  # as `STATE_NAMES`
        return {"images": self._draw(CAMERAS), "state": state, "task": instruction(*self.task)}


def check_action(action: Any) -> np.ndarray:
    """`action` as float64 [7], clipped to [-1, 1]. Raises InputError naming the wrong shape or the wrong entries."""
    array = np.asarray(action, dtype=np.float64)
    if array.shape != (ACTION_DIM,):
        raise InputError(
            f"action: got shape {array.shape}, expected ({ACTION_DIM},): {', '.join(ACTION_NAMES)}"
            + ("; pass one step of a chunk at a time" if array.ndim == 2 else "")
        )

    # np.clip keeps NaN. MuJoCo would drive with zeros instead, and say so only in its MUJOCO_LOG.TXT.
    if not np.isfinite(array).all():
        bad = [f"{name}={value}" for name, value in zip(ACTION_NAMES, array, strict=True) if not np.isfinite(value)]
        raise InputError(f"action: got {', '.join(bad)}, expected finite numbers in [-1, 1]")

    return np.clip(array, -1, 1)


def _choose_task(layout: SceneLayout, swap: bool, task: Any) -> tuple[str, str]:
    if task is not None:
        if swap:
            raise InputError("reset options: got both 'swap' and 'task', expected one of them")
        block, bowl = task
        check_color(block, layout.block_colors, "task: block color in this scene")
        return block, check_color(bowl, layout.bowl_colors, "task: bowl color in this scene")
    if not swap:
        return layout.task

    # Both differ from the scene's own, so that an object moved by habit is a wrong one whichever it is.
    block, bowl = layout.block_colors.index(layout.task[0]), layout.bowl_colors.index(layout.task[1])
    return layout.block_colors[(block + 1) % BLOCKS], layout.bowl_colors[(bowl + 1) % BOWLS]


def _square_yaw(quat: np.ndarray) -> float:
    """Yaw of a square, modulo its quarter turns: in [-pi/4, pi/4)."""
    w, x, y, z = quat
    yaw = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
    return float((yaw + np.pi / 4) % (np.pi / 2) - np.pi / 4)


def _achieved(table: Table, task: tuple[str, str]) -> bool:
    block, bowl = task
    return table.container(block) == bowl and table.opening > 0.8 and table.block(block).speed < _AT_REST


def _misplaced(table: Table, task: tuple[str, str]) -> bool:
    target, goal = task
    # `container` counts no block that is held, so carrying one across a bowl is no mistake yet.
    inside = {b.color: table.container(b.color) for b in table.blocks}
    return any(bowl is not None and (color != target or bowl != goal) for color, bowl in inside.items())
