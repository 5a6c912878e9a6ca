// Copies text, also where the page came over plain HTTP: browsers offer `navigator.clipboard` over HTTPS only.

/** Whether the text is in the clipboard now. */
export async function copy(text: string): Promise<boolean> {
  try {
    if (navigator.clipboard) {
      await navigator.clipboard.writeText(text);
      return true;
    }
  } catch {
    // Refused by the browser's settings; the old way may still be open.
  }
  const area = Object.assign(document.createElement("textarea"), { value: text, readOnly: true });
  area.className = "unseen";
  const focused = document.activeElement;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  if (focused instanceof HTMLElement) focused.focus();
  return copied;
}
