"""A table with three blocks and a few bowls; only the instruction tells which block goes where.

    env = make_tabletop("put", image_size=64)
    observation, info = env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step(action)

Observation: images.front, images.wrist uint8 [64, 64, 3]; state float32 [5] = gripper x, y, z (meters), yaw (radians),
opening (0 closed to 1 open); task, the instruction. Action float32 [7] in [-1, 1] at 10 Hz: dx, dy, dz (x `MAX_STEP`
meters), droll, dpitch (accepted and ignored: the wrist has no such joint), dyaw (x `MAX_TURN` radians), gripper
(> 0 closes, else opens). Moves are relative to the measured pose and come to rest within the step, so nothing hidden is
carried from one step to the next.

Blocks are grasped by friction alone. Fingers meet blocks only: they pass through bowls, distractors and table. Bowls
do not move but in the task `moving`. The tasks are in docs/tasks.md.
"""

from __future__ import annotations

import itertools
import zlib
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium import spaces

from insula.errors import InputError, did_you_mean
from insula.worlds.tabletop.facts import Block, Bowl, Distractor, Facts, Table, look, project
from insula.worlds.tabletop.goals import Goal, Placement, achieved, credit, fulfilled, misplaced, subtask
from insula.worlds.tabletop.instructions import check_color
from insula.worlds.tabletop.rendering import Renderer
from insula.worlds.tabletop.scene import (
    BLOCKS,
    CAMERAS,
    DISTRACTOR_RADIUS,
    FINGER_TRAVEL,
    GRIPPER_HIGH,
    GRIPPER_LOW,
    RGBA,
    YAW_LIMIT,
    SceneLayout,
    draw_anything,
    mjcf,
)
from insula.worlds.tabletop.tasks import find_task
from insula.worlds.tabletop.tasks.pairs import pair_goal
from insula.worlds.tabletop.tasks.put import PUT
from insula.worlds.tabletop.tasks.task import SPLITS, Scene, Task

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


class TabletopEnv(gymnasium.Env):
    """See the module's docstring. Reward 1 and termination at success; termination, too, where success has become
    impossible: a block out of turn where the goal names an order. `info` tells `success`, `wrong_object`, `held`,
    `credit` (the share of what was asked for that is done) and `subtask` (what to do next, in words).

    success: all that the goal names lies where it shall, at rest, and the gripper is open; where it names an order,
    each came there in its turn. wrong_object (remembered until the next reset): a block came to lie in a bowl, or, but
    for `put`, on a block, where the goal does not want it, or out of turn, with the gripper off it.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}  # noqa: RUF012 (Gymnasium's own convention)

    def __init__(self, image_size: int = 64, render_mode: str | None = None, task: str = "put") -> None:
        if not isinstance(image_size, int) or not 16 <= image_size <= 1024:
            raise InputError(f"image_size: got {image_size!r}, expected an integer from 16 to 1024 (64 is usual)")
        if render_mode not in (None, "rgb_array"):
            raise InputError(f"render_mode: got {render_mode!r}, expected None or 'rgb_array'")

        self.image_size = image_size
        self.render_mode = render_mode
        self.looking = True  # while it is False, observations have no images
        self.task: Task = find_task(task)

        # A little wider than the joints' limits, which MuJoCo keeps by a spring: they may give way by millimeters.
        image = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        low = np.array([*(GRIPPER_LOW - 0.02), -YAW_LIMIT - 0.1, 0], np.float32)
        high = np.array([*(GRIPPER_HIGH + 0.02), YAW_LIMIT + 0.1, 1], np.float32)
        self.observation_space = spaces.Dict(
            {
                "images": spaces.Dict({name: image for name in CAMERAS}),
                "state": spaces.Box(low, high, dtype=np.float32),
                "task": spaces.Text(80, charset="abcdefghijklmnopqrstuvwxyz "),
            }
        )
        self.action_space = spaces.Box(-1, 1, (ACTION_DIM,), np.float32)

        # Compiled once. Scenes differ in poses, colors and sizes alone, so the renderer's context, made of it, stays.
        self.model = mujoco.MjModel.from_xml_string(mjcf(image_size, self.task.bowls, self.task.distractors))
        self.data = mujoco.MjData(self.model)
        self._blocks = [self.model.body(f"block{i}").id for i in range(BLOCKS)]
        self._bowls = [self.model.body(f"bowl{i}").id for i in range(self.task.bowls)]
        self._distractors = [self.model.body(f"distractor{i}").id for i in range(len(self.task.distractors))]
        self._fingers = [self.model.geom(name).id for name in ("left", "right")]
        self._block_geoms = [self.model.geom(f"block{i}").id for i in range(BLOCKS)]

        self._renderer: Renderer | None = None  # with the first image: physics alone needs no OpenGL
        self._layout: SceneLayout | None = None
        self._wrong = False

    # --- Gymnasium ---------------------------------------------------------------------------------------------------

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """A new scene, the same for the same seed; those of different tasks have nothing in common. Options:

        swap     (bool) asks for something else in that same scene: other blocks in other places, or another order
        split    "train", or "held_out" for words, and pairs of `unseen-pairs`, that no demonstration has
        task     (block color, bowl color) to ask for, where the task's goal is such a pair

        Raises InputError for other options, for colors not in the scene, and for what the task cannot be asked.
        """
        super().reset(seed=seed)
        options = dict(options or {})

        split = options.pop("split", "train")
        if split not in SPLITS:
            hint = did_you_mean(str(split), SPLITS)
            raise InputError(f"reset options: split: got {split!r}, expected one of {', '.join(SPLITS)}{hint}")

        # The scene is drawn before the other options are looked at: they must not change what a seed means.
        scene = self.task.draw(self._rng(seed), split)
        goal = _choose_goal(self.task, scene, swap=bool(options.pop("swap", False)), pair=options.pop("task", None))
        if options:
            raise InputError(f"reset options: got {sorted(options)}, expected only 'swap', 'split' and 'task'")

        self._pour(scene.layout, goal)
        return self._observe(), self._info(self.table())

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """One tenth of a second. Raises InputError for an action of the wrong shape or with NaN or infinity,
        RuntimeError before the first reset."""
        if self._layout is None:
            raise RuntimeError("step() before reset(): the table is empty")

        self._move(self._layout, check_action(action))
        table = self.table()
        self._judge(table)

        info = self._info(table)
        over = bool(info["success"]) or self._out_of_turn
        return self._observe(), float(info["success"]), over, False, info

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

        No physics is stepped: for images with known facts, not for episodes. Raises InputError for tasks but `put`,
        whose scenes these are.
        """
        if self.task is not PUT:
            raise InputError(f"randomize(): this is task {self.task.name!r}, and only {PUT.name!r} has such scenes")

        layout, pair = draw_anything(rng)
        self._pour(layout, pair_goal(pair))
        return self._observe()

    @property
    def goal(self) -> Goal:
        """What is asked for. Raises RuntimeError before the first reset."""
        if self._layout is None:
            raise RuntimeError("no goal before reset(): the table is empty")
        return self._goal

    def table(self) -> Table:
        """The truth in meters, fast (no projection). Raises RuntimeError before the first reset."""
        layout, data = self._layout, self.data
        if layout is None:
            raise RuntimeError("table() before reset(): the table is empty")

        # qvel: four joints of the gripper and two fingers, then six of each block, of which three are linear.
        quats, speeds = data.xquat[self._blocks], data.qvel[6:].reshape(BLOCKS, 6)
        blocks = tuple(
            Block(color, data.xpos[b].copy(), _square_yaw(q), float(np.linalg.norm(v[:3])), half)
            for color, b, q, v, half in zip(
                layout.block_colors, self._blocks, quats, speeds, layout.block_halves, strict=True
            )
        )
        bowls = tuple(Bowl(c, data.xpos[b].copy()) for c, b in zip(layout.bowl_colors, self._bowls, strict=True))

        names = zip(self.task.distractors, layout.distractor_colors, self._distractors, strict=True)
        distractors = tuple(Distractor(shape, color, data.xpos[b].copy()) for shape, color, b in names)

        # Copies: `data` is MuJoCo's own memory, and the next step writes over it.
        held = self._held(layout)
        return Table(blocks, bowls, data.qpos[:3].copy(), float(data.qpos[3]), self._opening(), held, distractors)

    def facts(self) -> Facts:
        """The truth in meters and in the pixels of every camera. Raises RuntimeError before the first reset."""
        table = self.table()
        names = [f"{b.color} block" for b in table.blocks] + [f"{b.color} bowl" for b in table.bowls]
        names += [f"{d.color} {d.shape}" for d in table.distractors]
        bodies = dict(zip(names, [*self._blocks, *self._bowls, *self._distractors], strict=True))
        return look(self.model, self.data, table, bodies, self.image_size)

    def chunk_pixels(self, chunk: np.ndarray, camera: str = "front") -> np.ndarray:
        """Where the fingertips would go if every move of a chunk [H, 7] came out as it says: pixels float64 [H + 1, 2]
        (x, y from the top left) of a camera as it stands now. The first is where they are.

        Raises InputError for a camera that is not there and as `check_action`, RuntimeError before the first reset.
        """
        if camera not in CAMERAS:
            raise InputError(f"camera: got {camera!r}, expected one of {', '.join(CAMERAS)}")

        points = [self.table().gripper]
        for action in chunk:
            points.append(np.clip(points[-1] + MAX_STEP * check_action(action)[:3], GRIPPER_LOW, GRIPPER_HIGH))
        return project(self.model, self.data, camera, np.stack(points), self.image_size)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _rng(self, seed: int | None) -> np.random.Generator:
        """Of the next scene, by task and seed."""
        # By the seed alone for the task that was there first: its data sets and rates were made with these scenes.
        if self.task is PUT:
            return self.np_random

        number = int(self.np_random.integers(2**31)) if seed is None else seed
        return np.random.default_rng([zlib.crc32(self.task.name.encode()), number])

    def _pour(self, layout: SceneLayout, goal: Goal) -> None:
        """Put a layout on the table: poses into the data, colors and sizes into the model."""
        mujoco.mj_resetData(self.model, self.data)
        self._layout = layout
        self._goal = goal
        self._wrong = False
        self._lying: frozenset[Placement] = frozenset()
        self._out_of_turn = False

        # qpos: x, y, z, yaw of the gripper, two fingers, then position and quaternion (w first) of each block.
        qpos = self.data.qpos
        qpos[:4], qpos[4:6] = layout.gripper, layout.travel
        for i, (x, y, z, yaw) in enumerate(layout.block_poses):
            qpos[6 + 7 * i : 13 + 7 * i] = [x, y, z, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
        bowls = len(self._bowls)  # mocap bodies are numbered as the model lists them: distractors after the bowls
        self.data.mocap_pos[:bowls, :2], self.data.mocap_pos[:bowls, 2] = layout.bowl_xy, 0
        self.data.mocap_pos[bowls:, :2], self.data.mocap_pos[bowls:, 2] = layout.distractor_xy, DISTRACTOR_RADIUS

        colors = [*layout.block_colors, *layout.bowl_colors, *layout.distractor_colors]
        for body, color in zip([*self._blocks, *self._bowls, *self._distractors], colors, strict=True):
            self.model.geom_rgba[self.model.geom_bodyid == body] = RGBA[color]
        for body, half in zip(self._blocks, layout.block_halves, strict=True):
            _resize(self.model, body, half)

        # Motors hold the pose they start in, instead of pulling back to zero at the first step.
        self.data.ctrl[:4], self.data.ctrl[4:] = layout.gripper, layout.travel
        mujoco.mj_forward(self.model, self.data)  # poses of bodies and cameras, which setting qpos leaves as they were

    def _move(self, layout: SceneLayout, action: np.ndarray) -> None:
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
            for bowl, path in enumerate(layout.paths):
                self.data.mocap_pos[bowl, :2] = path.at(self.data.time)
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

    def _judge(self, table: Table) -> None:
        """Remember what was right and what was wrong in this state, though it may yet be put right, or be undone."""
        goal = self._goal
        lying = frozenset(one for one in goal.placements if fulfilled(table, one))
        if goal.ordered:
            missing = itertools.dropwhile(lying.__contains__, goal.placements)  # the first that is, and all behind it
            self._out_of_turn |= any(one in lying - self._lying for one in missing)
        self._lying = lying
        self._wrong = self._wrong or misplaced(table, goal, self.task.judge_stacks) or self._out_of_turn

    def _info(self, table: Table) -> dict[str, Any]:
        return {
            "success": achieved(table, self._goal) and not self._out_of_turn,
            "wrong_object": self._wrong,
            "held": table.held,
            "credit": credit(table, self._goal),
            "subtask": subtask(table, self._goal),
        }

    def _draw(self, cameras: tuple[str, ...]) -> dict[str, np.ndarray]:
        if self._renderer is None:
            self._renderer = Renderer(self.model, self.image_size)
        return self._renderer.draw(self.data, cameras)

    def _observe(self) -> dict[str, Any]:
        state = np.array([*self.data.qpos[:4], self._opening()], np.float32)  # as `STATE_NAMES`
        return {"images": self._draw(CAMERAS) if self.looking else {}, "state": state, "task": self._goal.instruction}


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


def _choose_goal(task: Task, scene: Scene, swap: bool, pair: Any) -> Goal:
    if swap and pair is not None:
        raise InputError("reset options: got both 'swap' and 'task', expected one of them")
    if pair is not None and not task.takes_pair:
        raise InputError(f"reset options: task: a goal of {task.name!r} is no pair of a block and a bowl; leave it out")

    if pair is not None:
        block, bowl = pair
        check_color(block, scene.layout.block_colors, "task: block color in this scene")
        return pair_goal((block, check_color(bowl, scene.layout.bowl_colors, "task: bowl color in this scene")))

    return scene.other if swap else scene.goal


def _resize(model: mujoco.MjModel, body: int, half: float) -> None:
    """Make a block's sides twice `half` meters long, where they are not. Its mass stays."""
    geom = model.body_geomadr[body]
    if model.geom_size[geom, 0] == half:
        return

    # And what MuJoCo derived from it when it compiled, to exclude collisions and rays by.
    model.geom_size[geom] = half
    model.geom_rbound[geom] = half * np.sqrt(3)
    model.geom_aabb[geom, 3:] = half
    model.bvh_aabb[model.body_bvhadr[body], 3:] = half  # a tree of one: a block is a single geom


def _square_yaw(quat: np.ndarray) -> float:
    """Yaw of a square, modulo its quarter turns: in [-pi/4, pi/4)."""
    w, x, y, z = quat
    yaw = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
    return float((yaw + np.pi / 4) % (np.pi / 2) - np.pi / 4)
