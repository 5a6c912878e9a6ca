// What the page asks of the gateway. The key lives in this browser tab only.

export type Status = "queued" | "processing" | "ready" | "failed";
export type Collection = { id: string; name: string; documents: number };
export type Document = { id: string; name: string; status: Status; progress: number; error: string | null; pages?: number | null };
export type Citation = {
  number: number;
  document_id: string;
  document: string;
  page: number | null;
  heading: string | null;
  passage: string;
  score: number;
  chunk: number;
};
export type Chunk = { ordinal: number; page: number | null; heading: string | null; text: string };
export type Me = { tenant: string; name: string; admin: boolean; max_upload_bytes: number; max_collections: number };
export type Turn = { role: "user" | "assistant"; content: string };

/** Longest answer, in tokens: two pages. Without a bound a small model may talk on until its context is full. */
const MAX_ANSWER_TOKENS = 1024;

/** Why something did not work. `code` is the gateway's, or `network`; `message` is the gateway's English. `explain` makes it readable. */
export class ApiError extends Error {
  constructor(
    readonly status: number,
    readonly code: string,
    message = "",
  ) {
    super(message);
  }
}

const KEY = "verbund.key";
let refused = () => {};

export const session = {
  get key() {
    return sessionStorage.getItem(KEY) ?? "";
  },
  set key(value: string) {
    if (value) sessionStorage.setItem(KEY, value);
    else sessionStorage.removeItem(KEY);
  },
  /** What to do when the gateway does not take the key any more. */
  set onRefused(then: () => void) {
    refused = then;
  },
};

/** Takes the key out of `#key=…` and removes it from the address, so that it is not copied along. */
export function keyFromAddress() {
  const key = new URLSearchParams(location.hash.slice(1)).get("key");
  if (!key) return;
  session.key = key;
  history.replaceState(null, "", location.pathname);
}

function authorization(): string {
  // A header takes nothing else; a key with an umlaut is a wrong key and no broken connection.
  if (!/^[\x21-\x7e]+$/.test(session.key)) throw failed(401, null);
  return `Bearer ${session.key}`;
}

function failed(status: number, body: { error?: { code?: string; message?: string } } | null): ApiError {
  if (status === 401) refused();
  const code = body?.error?.code ?? (status === 401 ? "invalid_api_key" : status === 413 ? "too_large" : "");
  return new ApiError(status, code, body?.error?.message ?? `HTTP ${status}`);
}

/** An abort stays what it is; everything else that `fetch` throws is a connection that does not work. */
function broken(e: unknown): unknown {
  return e instanceof DOMException && e.name === "AbortError" ? e : new ApiError(0, "network");
}

async function request(path: string, init: RequestInit = {}): Promise<Response> {
  const headers = new Headers(init.headers);
  headers.set("Authorization", authorization());
  if (typeof init.body === "string") headers.set("Content-Type", "application/json");
  const reply = await fetch(path, { ...init, headers }).catch((e) => Promise.reject(broken(e)));
  if (!reply.ok) throw failed(reply.status, await reply.json().catch(() => null));
  return reply;
}

async function get<T>(path: string, signal?: AbortSignal): Promise<T> {
  const reply = await request(path, { signal });
  return reply.json().catch((e) => Promise.reject(broken(e)));
}

export const me = () => get<Me>("/api/me");
export const collections = async () => (await get<{ data: Collection[] }>("/api/collections")).data;
export const documents = async (collection: string) =>
  (await get<{ data: Document[] }>(`/api/collections/${collection}/documents`)).data;
export const chunks = async (id: string) => (await get<{ data: Chunk[] }>(`/api/documents/${id}/chunks`)).data;
export const original = async (id: string) =>
  (await request(`/api/documents/${id}/original`)).blob().catch((e) => Promise.reject(broken(e)));

export const createCollection = async (name: string): Promise<Collection> =>
  (await request("/api/collections", { method: "POST", body: JSON.stringify({ name }) })).json();
export const deleteCollection = (id: string) => request(`/api/collections/${id}`, { method: "DELETE" });
export const deleteDocument = (id: string) => request(`/api/documents/${id}`, { method: "DELETE" });

/** The first model that can chat, as an id for `chat`. */
export async function chatModel(signal: AbortSignal): Promise<string> {
  const { data } = await get<{ data: { id: string; kind?: string }[] }>("/v1/models", signal);
  const model = data.find((m) => m.kind !== "embed");
  if (!model) throw new ApiError(503, "model_not_ready");
  return model.id;
}

/** Uploads one file; `progress` is called with 0…1 while bytes travel. */
export function upload(collection: string, file: File, progress: (share: number) => void): Promise<Document> {
  return new Promise((resolve, reject) => {
    const form = new FormData();
    form.append("file", file);
    const xhr = new XMLHttpRequest(); // fetch tells nothing about upload progress
    xhr.open("POST", `/api/collections/${collection}/documents`);
    xhr.setRequestHeader("Authorization", authorization());
    xhr.responseType = "json";
    xhr.upload.onprogress = (e) => e.lengthComputable && progress(e.loaded / e.total);
    xhr.onload = () => (xhr.status < 300 && xhr.response ? resolve(xhr.response) : reject(failed(xhr.status, xhr.response)));
    xhr.onerror = () => reject(new ApiError(0, "network"));
    xhr.send(form);
  });
}

/** Streams one answer and says why it ended: `stop` or `length`. Throws an `AbortError` when `signal` aborts. */
export async function chat(
  model: string,
  turns: Turn[],
  collectionIds: string[],
  signal: AbortSignal,
  on: { text: (piece: string) => void; citations: (list: Citation[]) => void },
): Promise<string> {
  const body = JSON.stringify({
    model,
    messages: turns,
    stream: true,
    max_tokens: MAX_ANSWER_TOKENS,
    ...(collectionIds.length && { collections: collectionIds }),
  });
  const reply = await request("/v1/chat/completions", { method: "POST", body, signal });
  if (!reply.body) throw new ApiError(0, "network");
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let reason = "stop";
  for (;;) {
    const { done, value } = await reader.read().catch((e) => Promise.reject(broken(e)));
    // Without its last event an answer is not complete, however well its last sentence may end.
    if (done) throw new ApiError(0, "interrupted");
    const events = (rest + value).split("\n\n");
    rest = events.pop() ?? "";
    for (const event of events) {
      const data = event.split("\n").find((line) => line.startsWith("data: "))?.slice(6);
      if (!data) continue;
      if (data === "[DONE]") return reason;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(0, chunk.error.code ?? "", chunk.error.message);
      const choice = chunk.choices?.[0];
      if (choice?.delta?.content) on.text(choice.delta.content);
      if (choice?.finish_reason) reason = choice.finish_reason;
      if (chunk.citations) on.citations(chunk.citations);
    }
  }
}
