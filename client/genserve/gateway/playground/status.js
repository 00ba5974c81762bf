// The status tab, refreshed while it is shown, and the state in the page's head.

import { ask } from "./api.js";
import { at, bytes, copyOf, counted, duration, keyed, showError, write } from "./dom.js";

const REFRESH_MS = 2500;
const SHOWN_TASKS = 12;
const HEALTH_MS = 10_000;
const HEALTH = { ready: "Ready", unready: "Not ready", offline: "Unreachable" };

let timer = null;

/** Keep the page's head informed. */
export function startHealth() {
  const look = async () => {
    if (document.hidden) return;
    let state = "ready";
    try {
      await ask("health");
    } catch (error) {
      state = error.status ? "unready" : "offline";
    }
    at("health").dataset.state = state;
    write(at("health").firstElementChild, HEALTH[state]);
  };
  setInterval(look, HEALTH_MS);
  document.addEventListener("visibilitychange", look);
  look();
}

/** Refresh the tab while it is shown. */
export function showStatus(isShown) {
  clearTimeout(timer);
  timer = isShown ? setTimeout(refresh, 0) : null;
}

async function refresh() {
  const mine = timer;
  const wait = document.hidden ? 0 : await update();
  if (timer === mine) timer = setTimeout(refresh, Math.max(REFRESH_MS, wait * 1000));
}

/** Show the servers' state; return the seconds to wait before the next look, 0 without a wish of the gateway. */
async function update() {
  try {
    const [status, load] = await Promise.all([ask("status"), ask("gpu/load")]);
    render(status, load.instances);
    write(at("refreshed"), `As of ${new Date().toLocaleTimeString()}`);
    showError(at("status-error"), null);
    at("status").classList.remove("stale");
    return 0;
  } catch (error) {
    showError(at("status-error"), error);
    at("status").classList.add("stale");
    return error.wait ?? 0;
  }
}

function render({ servers, concurrent_manager: totals }, instances) {
  const ready = servers.filter((server) => server.ready).length;
  const values = {
    running: totals.running_tasks,
    waiting: totals.global_queue_size,
    instances: `${totals.ready_instances} of ${totals.instances}`,
    servers: `${ready} of ${servers.length}`,
  };
  for (const [name, value] of Object.entries(values)) write(part(at("totals"), name), String(value));
  const many = servers.length > 1;
  keyed(at("instances"), instances, {
    key: (load) => `${load.url} ${load.instance}`,
    create: () => copyOf("instance-template"),
    update: (element, load) => updateInstance(element, load, many),
    empty: "No instance has reported yet.",
  });
  const tasks = servers.flatMap((server) => server.tasks.map((task) => ({ ...task, url: server.url })));
  const more = tasks.length - SHOWN_TASKS;
  write(at("tasks-figures"), more > 0 ? `the first ${SHOWN_TASKS} of ${tasks.length}` : "");
  keyed(at("tasks"), tasks.slice(0, SHOWN_TASKS), {
    key: (task) => `${task.url} ${task.task_id} ${task.arrived}`,
    create: () => copyOf("task-template"),
    update: updateTask,
    empty: "Nothing is running.",
  });
  keyed(at("servers"), servers, {
    key: (server) => server.url,
    create: () => copyOf("server-template"),
    update: updateServer,
    empty: "No server is set.",
  });
}

const part = (element, name) => element.querySelector(`[data-of="${name}"]`);

function badge(element, good, text) {
  element.dataset.good = String(good);
  write(element, text);
}

function updateInstance(element, load, many) {
  write(element.querySelector("strong"), load.instance);
  badge(element.querySelector(".badge"), load.ready, load.ready ? "Ready" : "Starting");
  write(element.querySelector(".place"), many ? `${load.device} on ${load.url}` : load.device);
  write(part(element, "running"), String(load.running));
  write(part(element, "waiting"), String(load.waiting));
  const { memory_used: own, memory_free: free, memory_total: total } = load;
  element.querySelector(".memory").hidden = !total;
  if (!total) return;
  const used = Math.max(0, total - (free ?? total) - own);
  write(element.querySelector(".amount"), `${bytes(own)} here, ${bytes(free ?? 0)} free of ${bytes(total)}`);
  element.querySelector(".own").style.setProperty("--share", own / total);
  element.querySelector(".others").style.setProperty("--share", used / total);
}

function updateTask(element, task) {
  write(element.querySelector("code"), task.task_id);
  write(element.querySelector(".what"), task.instance ?? task.model ?? "");
  element.querySelector("progress").value = task.steps ? task.step / task.steps : 0;
  write(element.querySelector(".state"), task.steps ? `${task.step} of ${task.steps}` : task.state);
}

function updateServer(element, server) {
  write(element.querySelector("strong"), server.url);
  const state = server.ready ? "Ready" : server.live ? "Not ready" : "Unreachable";
  badge(element.querySelector(".badge"), server.ready, state);
  const about = `Triton ${server.version}, ${counted(server.models.length, "model")}`;
  write(element.querySelector(".hint"), server.error || about);
  element.querySelector(".scroll").hidden = !server.models.length;
  const rows = server.models.map((model) => {
    const state = model.reason ? `${model.state}: ${model.reason}` : model.state;
    return [model.name, state, model.succeeded, model.failed, duration(model.queue_s)];
  });
  const body = element.querySelector("tbody");
  while (body.rows.length > rows.length) body.deleteRow(-1);
  rows.forEach((values, index) => {
    const row = body.rows[index] ?? body.insertRow();
    values.forEach((value, column) => write(row.cells[column] ?? row.insertCell(), String(value)));
  });
}
