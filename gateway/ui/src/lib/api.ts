// What the page asks of the gateway. The key lives in this browser tab only.

export type Status = "queued" | "processing" | "ready" | "failed";
export type Collection = { id: string; name: string; documents: number };
export type Document = { id: string; name: string; status: Status; progress: number; error: string | null; pages?: number | null };
export type Citation = {
  document_id: string;
  document: string;
  page: number | null;
  heading: string | null;
  passage: string;
  score: number;
};
export type Chunk = { ordinal: number; page: number | null; heading: string | null; text: string };
export type Me = { tenant: string; name: string; admin: boolean };
export type Turn = { role: "user" | "assistant"; content: string };

/** An answer of the gateway that is no success; `message` is for people. */
export class ApiError extends Error {
  constructor(
    readonly status: number,
    message: string,
  ) {
    super(message);
  }
}

const KEY = "verbund.key";

export const session = {
  get key() {
    return sessionStorage.getItem(KEY) ?? "";
  },
  set key(value: string) {
    if (value) sessionStorage.setItem(KEY, value);
    else sessionStorage.removeItem(KEY);
  },
};

/** Takes the key out of `#key=…` and removes it from the address, so that it is not copied along. */
export function keyFromAddress() {
  const key = new URLSearchParams(location.hash.slice(1)).get("key");
  if (!key) return;
  session.key = key;
  history.replaceState(null, "", location.pathname);
}

async function request(path: string, init: RequestInit = {}): Promise<Response> {
  const headers = new Headers(init.headers);
  headers.set("Authorization", `Bearer ${session.key}`);
  if (typeof init.body === "string") headers.set("Content-Type", "application/json");
  const reply = await fetch(path, { ...init, headers });
  if (!reply.ok) throw new ApiError(reply.status, await messageOf(reply));
  return reply;
}

async function messageOf(reply: Response): Promise<string> {
  const body = await reply.json().catch(() => null);
  return body?.error?.message ?? `HTTP ${reply.status}`;
}

const get = async <T>(path: string): Promise<T> => (await request(path)).json();

export const me = () => get<Me>("/api/me");
export const collections = async () => (await get<{ data: Collection[] }>("/api/collections")).data;
export const documents = async (collection: string) =>
  (await get<{ data: Document[] }>(`/api/collections/${collection}/documents`)).data;
export const document = (id: string) => get<Document>(`/api/documents/${id}`);
export const chunks = async (id: string) => (await get<{ data: Chunk[] }>(`/api/documents/${id}/chunks`)).data;
export const original = async (id: string) => (await request(`/api/documents/${id}/original`)).blob();

export const createCollection = async (name: string): Promise<Collection> =>
  (await request("/api/collections", { method: "POST", body: JSON.stringify({ name }) })).json();
export const deleteCollection = (id: string) => request(`/api/collections/${id}`, { method: "DELETE" });
export const deleteDocument = (id: string) => request(`/api/documents/${id}`, { method: "DELETE" });

/** The first model that can chat, as an id for `chat`. */
export async function chatModel(): Promise<string> {
  const { data } = await get<{ data: { id: string; kind?: string }[] }>("/v1/models");
  const model = data.find((m) => m.kind !== "embed");
  if (!model) throw new ApiError(503, "Kein Sprachmodell verfügbar / no model available");
  return model.id;
}

/** Uploads one file; `progress` is called with 0…1 while bytes travel. */
export function upload(collection: string, file: File, progress: (share: number) => void): Promise<Document> {
  return new Promise((resolve, reject) => {
    const form = new FormData();
    form.append("file", file);
    const xhr = new XMLHttpRequest(); // fetch tells nothing about upload progress
    xhr.open("POST", `/api/collections/${collection}/documents`);
    xhr.setRequestHeader("Authorization", `Bearer ${session.key}`);
    xhr.responseType = "json";
    xhr.upload.onprogress = (e) => e.lengthComputable && progress(e.loaded / e.total);
    xhr.onload = () =>
      xhr.status < 300
        ? resolve(xhr.response)
        : reject(new ApiError(xhr.status, xhr.response?.error?.message ?? `HTTP ${xhr.status}`));
    xhr.onerror = () => reject(new ApiError(0, "Verbindung unterbrochen / connection lost"));
    xhr.send(form);
  });
}

/** Streams one answer. Ends early without error when `signal` aborts. */
export async function chat(
  model: string,
  turns: Turn[],
  collectionIds: string[],
  signal: AbortSignal,
  on: { text: (piece: string) => void; citations: (list: Citation[]) => void },
) {
  const body = JSON.stringify({ model, messages: turns, stream: true, ...(collectionIds.length && { collections: collectionIds }) });
  const reply = await request("/v1/chat/completions", { method: "POST", body, signal });
  if (!reply.body) throw new ApiError(0, "keine Antwort / no answer");
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop() ?? "";
    for (const event of events) {
      const data = event.split("\n").find((line) => line.startsWith("data: "))?.slice(6);
      if (!data || data === "[DONE]") continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(503, chunk.error.message);
      const piece = chunk.choices?.[0]?.delta?.content;
      if (piece) on.text(piece);
      if (chunk.citations) on.citations(chunk.citations);
    }
  }
}
