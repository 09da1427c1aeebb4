-- Notebook to page: the first heading is the title, appendix code folds, figures get captions, names
-- lead to their definitions, and links into the repository lead to its public address (or are plain
-- text without one).
local title, repository
local defined, taken, figures = {}, {}, 0

-- What comes a second time gets a number, as GitHub does it; pandoc sees one cell at a time.
local function unique(id)
  local count = taken[id]
  taken[id] = (count or 0) + 1
  return count and id .. "-" .. count or id
end

local function definitions(code)
  local names = pandoc.List()
  for line in code:gmatch("[^\n]+") do
    local name = line:match("^def ([%w_]+)") or line:match("^class ([%w_]+)")
    if name then names:insert(name) end
  end
  return names
end

-- `name`, `name(...)` and `name.field` lead to the definition of name.
local function to_definition(code)
  local name = code.text:match("^[%a_][%w_]*")
  local rest = name and code.text:sub(#name + 1)
  if not defined[name or ""] then return nil end
  if rest == "" or rest:match("^%b()$") or rest:match("^%.[%w_.]+$") then
    return pandoc.Link(code, "#def-" .. name)
  end
end

local function scrolling(block, class, label)  -- a keyboard can scroll what is wider than the screen
  return pandoc.Div(block, pandoc.Attr("", {class}, {tabindex = "0", role = "group", ["aria-label"] = label}))
end

local function fold(block)
  local names = definitions(block.text)
  local summary = #names > 0 and "Code: <code>" .. table.concat(names, "</code>, <code>") .. "</code>" or "Code"
  return pandoc.Blocks({
    pandoc.RawBlock("html", "<details><summary>" .. summary .. "</summary>"), block,
    pandoc.RawBlock("html", "</details>"),
  })
end

local function cell(div)
  if (div.attributes.tags or ""):find('"appendix"', 1, true) then
    local body = pandoc.Blocks({})
    for _, block in ipairs(div.content) do
      if block.t == "CodeBlock" then body:extend(fold(block)) else body:insert(block) end
    end
    div.content = body
  end
  div.attributes = {}
  div.identifier = ""
  return div
end

local function captioned(image, caption)
  figures = figures + 1
  local name = pandoc.utils.stringify(caption):match("([%w_]+)_figure")
  local id = unique("figure-" .. (name or figures))
  caption = pandoc.Blocks(caption):walk({Str = function(str)  -- "Drawn by loss_figure."
    local drawn, rest = str.text:match("^([%w_]+_figure)(%p*)$")
    if drawn then return {pandoc.Code(drawn), pandoc.Str(rest)} end
  end})
  local anchor = pandoc.Link("", "#" .. id, "", {class = "anchor", ["aria-label"] = "Link to this figure"})
  caption[#caption].content:extend({pandoc.Str("\u{a0}"), anchor})
  return pandoc.Figure({pandoc.Plain({image})}, caption, {id = id})
end

local function only_image(block)
  local image = block.t == "Para" and #block.content == 1 and block.content[1]
  return image and image.t == "Image" and image or nil
end

-- A figure's caption is an attribute of an image that a cell drew, and elsewhere the line in italics below it.
local function with_figures(blocks)
  local result = pandoc.Blocks({})
  local i = 1
  while i <= #blocks do
    local image, below = only_image(blocks[i]), blocks[i + 1]
    local said = below and below.t == "Para" and #below.content == 1 and below.content[1].t == "Emph"
    if image and image.attributes.caption then
      local caption = pandoc.read(image.attributes.caption, "markdown").blocks
      image.attributes.caption = nil
      result:insert(captioned(image, caption))
    elseif image and said then
      result:insert(captioned(image, {pandoc.Plain(below.content[1].content)}))
      i = i + 1
    else
      result:insert(blocks[i])
    end
    i = i + 1
  end
  return result
end

return {
  {
    Meta = function(meta) repository = pandoc.utils.stringify(meta.repository or "") end,
    Div = function(div)
      if not div.classes:includes("code") then return nil end
      div:walk({CodeBlock = function(block)
        for _, name in ipairs(definitions(block.text)) do defined[name] = true end
      end})
    end,
    Para = function(para)  -- the notebook's own anchors; here headings have theirs
      for _, inline in ipairs(para.content) do
        if inline.t ~= "RawInline" then return nil end
      end
      return {}
    end,
  },
  {
    Header = function(header)
      if header.level == 1 and not title then
        title = header.content
        return {}
      end
      header.identifier = unique(header.identifier)
      return header
    end,
    Div = function(div)
      -- The table of contents knows only headings that stand in no box.
      if div.classes:includes("markdown") then return div.content end
      if div.classes:includes("code") then return cell(div) end
    end,
    Blocks = with_figures,
  },
  {
    traverse = "topdown",
    Link = function(link)
      if link.target:match("^#") or link.target:match("^%a+:") then return link, false end
      if repository == "" then return link.content, false end
      link.target = repository .. "/blob/main/" .. link.target
      return link, false
    end,
    Header = function(header)  -- a heading leads to itself, so that its address can be copied
      header.content = {pandoc.Link(header.content, "#" .. header.identifier)}
      return header, false
    end,
    Code = function(code) return to_definition(code), false end,
  },
  {
    Para = function(para)
      local math = #para.content == 1 and para.content[1]
      if math and math.t == "Math" and math.mathtype == "DisplayMath" then
        return scrolling(pandoc.Plain(para.content), "formula", "Formula")
      end
    end,
    Str = function(str)  -- 1e-6
      if str.text:match("%de%-%d") then return pandoc.Span(str, {class = "together"}) end
    end,
    Table = function(tab)
      for i, spec in ipairs(tab.colspecs) do tab.colspecs[i] = {spec[1], nil} end
      return scrolling(tab, "table", "Table")
    end,
    CodeBlock = function(block)
      block.attributes.tabindex = "0"
      return block
    end,
  },
  {Pandoc = function(document)
    document.meta.title = pandoc.MetaInlines(title or {})
    document.meta.pagetitle = pandoc.utils.stringify(title or {})
    return document
  end},
}
